"""Find the usable images of a training set by decoding every file before the first step.

A header says nothing about the pixels behind it: a truncated file passes every size check and
would end a training hours later. Decoded files are remembered by digest, so the next start only
hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import ImageError, SourceEmpty, SourceError
from workers.images.decode import decode

_READERS = 8
_NAMED = 3
_FORMAT = 1  # of the file of digests; raised when decoding changes what it refuses


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """One image and what is on it; boxes in pixels of the upright image.

    Attributes:
        path: the image file; ``file_name`` is its name in the COCO JSON.
        width, height: of the upright image, checked against the file's header.
        boxes: float32 [N, 4] xyxy, clipped to the image, none without area.
        labels: int64 [N], contiguous class indices.
        ignore: float32 [M, 4] xyxy.
    """

    path: Path
    file_name: str
    width: int
    height: int
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignore: NDArray[np.float32]


def find_faults(
    images: Sequence[TrainingImage], folder: Path, max_bad_share: float, checked: Path | None
) -> dict[str, str]:
    """Return the reason for each unusable image, by its name in the COCO JSON.

    Args:
        folder: of the images, for messages.
        max_bad_share: largest share that may be unusable.
        checked: file that remembers digests between starts; None: none.

    Raises:
        SourceEmpty: no image is usable.
        SourceError: more than ``max_bad_share`` cannot be used.
    """
    if not images:
        raise SourceEmpty(f"no image is listed for {folder}")
    sizes = _remembered(checked)
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda image: _looked_at(image, sizes), images))
    _remember(checked, {**sizes, **{digest: size for digest, size, _ in found if digest}})
    faults = {
        image.file_name: fault for image, (_, _, fault) in zip(images, found, strict=True) if fault
    }
    if len(faults) > max_bad_share * len(images):
        named = "; ".join(list(faults.values())[:_NAMED])
        raise SourceError(
            f"{len(faults)} of {len(images)} images cannot be used; the first: {named}",
            hint=f"correct the annotations or the files under {folder}, or leave such images out "
            f"by `max_bad_share` (now {max_bad_share:g})",
        )
    if len(faults) == len(images):
        raise SourceEmpty(f"none of the {len(images)} images under {folder} can be used")
    return faults


_Size = list[int] | str  # [width, height] of the upright image, or why it cannot be decoded


def _looked_at(image: TrainingImage, known: dict[str, _Size]) -> tuple[str, _Size, str]:
    """Return the file's digest, its size or fault, and what is wrong with it here ('': nothing)."""
    try:
        encoded = image.path.read_bytes()
    except FileNotFoundError:
        return "", "", f"{image.path} does not exist"
    except OSError as exc:
        return "", "", f"{image.path}: {exc.strerror or exc}"
    digest = hashlib.sha256(encoded).hexdigest()
    size = known.get(digest)
    if size is None:
        size = _decoded_size(encoded)
    if isinstance(size, str):
        return digest, size, f"{image.path}: {size}"
    if size != [image.width, image.height]:
        return digest, size, (
            f"{image.path} is {size[0]}×{size[1]} upright, "
            f"annotated as {image.width}×{image.height}"
        )  # fmt: skip
    return digest, size, ""


def _decoded_size(encoded: bytes) -> _Size:
    try:
        high, wide = decode(encoded, max_pixels=_MAX_PIXELS).pixels.shape[:2]
    except ImageError as exc:
        return str(exc)
    return [wide, high]


_MAX_PIXELS = 500_000_000  # a training image beyond it is a bomb


def _remembered(checked: Path | None) -> dict[str, _Size]:
    """Sizes and faults by digest; empty where the file is missing, damaged or of another format."""
    if checked is None:
        return {}
    try:
        fields: Any = json.loads(checked.read_text())
    except (OSError, ValueError):
        return {}
    good = isinstance(fields, dict) and fields.get("format") == _FORMAT
    return dict(fields["images"]) if good and isinstance(fields.get("images"), dict) else {}


def _remember(checked: Path | None, sizes: dict[str, _Size]) -> None:
    if checked is None:
        return
    checked.parent.mkdir(parents=True, exist_ok=True)
    partial = checked.with_suffix(".partial")
    partial.write_text(json.dumps({"format": _FORMAT, "images": sizes}) + "\n")
    partial.replace(checked)

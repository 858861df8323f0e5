"""A COCO-format set as the trainer reads it: files, boxes, classes, and regions to ignore.

Kept on purpose: images without any box (they teach what is background). Regions to ignore are
places where "no object" must not be taught: crowds (``iscrowd``), annotations with ``"ignore": 1``,
those of categories the caller names, and the entries ``{image_id, bbox}`` of an optional
top-level list ``ignore``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from storage.errors import ConfigError, SourceEmpty, SourceError

_HEADER_READERS = 8
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


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


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """All images, the class names by contiguous index, and the ids the COCO file gives them.

    ``without_area`` counts annotations that were left out because nothing of them lies in the
    image.
    """

    images: tuple[TrainingImage, ...]
    classes: tuple[str, ...]
    official_ids: tuple[int, ...]
    without_area: int

    @property
    def objects(self) -> int:
        """Boxes to learn, over all images."""
        return sum(len(image.labels) for image in self.images)


def read_training_set(
    annotations: Path, images: Path, *, ignore_categories: Sequence[str] = ()
) -> TrainingSet:
    """Read a COCO JSON and check every image file's header against it.

    Args:
        annotations: COCO JSON with ``images``, ``annotations`` and ``categories``.
        images: folder that ``file_name`` is relative to.
        ignore_categories: names of categories whose boxes become regions to ignore, and which
            are no class of the model.

    Raises:
        ConfigError: the file is missing or no COCO JSON, or a named category is not in it.
        SourceError: an image is missing, unreadable, or has another size than annotated.
        SourceEmpty: there is no image or no box to learn.
    """
    coco = _load(annotations)
    categories = _categories(coco, annotations, ignore_categories)
    grouped = _by_image(coco, annotations)
    regions = _ignored_by_image(coco)
    read: list[TrainingImage] = []
    lost = 0
    for entry in coco["images"]:
        image, without_area = _image(
            entry, images, grouped[entry["id"]], regions[entry["id"]], categories.index
        )
        read.append(image)
        lost += without_area
    _check_headers(read, images)
    found = TrainingSet(tuple(read), categories.names, categories.official_ids, lost)
    if found.objects == 0:
        raise SourceEmpty(
            f"{annotations}: {len(read)} images, but no box to learn",
            hint="check the annotations, and that not every category is ignored",
        )
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        coco = json.loads(path.read_bytes())
        missing = {"images", "annotations", "categories"} - coco.keys()
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, AttributeError) as exc:
        raise ConfigError(f"{path} is not a COCO JSON file: {exc}") from exc
    if missing:
        raise ConfigError(f"{path} is not a COCO JSON file: it has no {sorted(missing)}")
    return dict(coco)


@dataclass(frozen=True, slots=True)
class _Categories:
    """Classes to learn in the file's order; ``index`` holds -1 for ignored ones."""

    names: tuple[str, ...]
    official_ids: tuple[int, ...]
    index: dict[int, int]


def _categories(
    coco: dict[str, Any], annotations: Path, ignore_categories: Sequence[str]
) -> _Categories:
    names = [c["name"] for c in coco["categories"]]
    unknown = sorted(set(ignore_categories) - set(names))
    if unknown:
        raise ConfigError(
            f"ignore_categories {unknown} are not in {annotations}", hint=f"it has {names}"
        )
    learned = [c for c in coco["categories"] if c["name"] not in ignore_categories]
    index = {c["id"]: -1 for c in coco["categories"]}
    index.update({c["id"]: i for i, c in enumerate(learned)})
    return _Categories(
        tuple(c["name"] for c in learned), tuple(int(c["id"]) for c in learned), index
    )


def _by_image(coco: dict[str, Any], annotations: Path) -> defaultdict[int, list[dict[str, Any]]]:
    known_images = {entry["id"] for entry in coco["images"]}
    known_categories = {c["id"] for c in coco["categories"]}
    grouped: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in coco["annotations"]:
        if annotation["image_id"] not in known_images:
            raise ConfigError(
                f"{annotations}: annotation {annotation.get('id')} is of image "
                f"{annotation['image_id']}, which the file does not list"
            )
        if annotation["category_id"] not in known_categories:
            raise ConfigError(
                f"{annotations}: annotation {annotation.get('id')} has category "
                f"{annotation['category_id']}, which the file does not list"
            )
        grouped[annotation["image_id"]].append(annotation)
    return grouped


def _ignored_by_image(coco: dict[str, Any]) -> defaultdict[int, list[list[float]]]:
    regions: defaultdict[int, list[list[float]]] = defaultdict(list)
    for region in coco.get("ignore", []):
        regions[region["image_id"]].append(region["bbox"])
    return regions


def _image(
    entry: dict[str, Any],
    folder: Path,
    annotations: Iterable[dict[str, Any]],
    regions: Iterable[list[float]],
    index: dict[int, int],
) -> tuple[TrainingImage, int]:
    boxes: list[list[float]] = []
    labels: list[int] = []
    ignore = list(regions)
    for annotation in annotations:
        label = index[annotation["category_id"]]
        if label < 0 or annotation.get("iscrowd") or annotation.get("ignore"):
            ignore.append(annotation["bbox"])
        else:
            boxes.append(annotation["bbox"])
            labels.append(label)
    size = (int(entry["width"]), int(entry["height"]))
    inside, kept = _clipped(boxes, size)
    image = TrainingImage(
        folder / entry["file_name"], entry["file_name"], *size,
        inside, np.array(labels, np.int64)[kept], _clipped(ignore, size)[0],
    )  # fmt: skip
    return image, int((~kept).sum())


def _clipped(
    xywh: list[list[float]], size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes as xyxy within the image, and which of the given ones have area there."""
    boxes = np.array(xywh, np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, size[0])
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, size[1])
    kept = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).astype(np.bool_)
    return boxes[kept], kept


def _check_headers(images: Sequence[TrainingImage], folder: Path) -> None:
    """Before the first step, not in the middle of the night: every file is there and fits."""
    if not images:
        raise SourceEmpty(f"no image is listed for {folder}")
    with ThreadPoolExecutor(_HEADER_READERS) as pool:
        faults = [fault for fault in pool.map(_header_fault, images) if fault]
    if faults:
        raise SourceError(
            f"{len(faults)} of {len(images)} images cannot be used; the first: {faults[0]}",
            hint=f"correct the annotations or the files under {folder}",
        )


def _header_fault(image: TrainingImage) -> str | None:
    try:
        with Image.open(image.path) as opened:
            size = opened.size
            sideways = opened.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
    except FileNotFoundError:
        return f"{image.path} does not exist"
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as exc:
        return f"{image.path}: {exc}"
    upright = size[::-1] if sideways else size
    if upright != (image.width, image.height):
        return (
            f"{image.path} is {upright[0]}×{upright[1]} upright, "
            f"annotated as {image.width}×{image.height}"
        )
    return None

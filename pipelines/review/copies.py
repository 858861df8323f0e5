"""Copy the routed images, for Label Studio to serve.

Only routed images are copied, to ``review/images/<sha256>.<kind>``: the name is the pixels, so a
copy never has to be made twice and never shows another image. What a browser would not show, or
not upright, is written anew as PNG.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2

from storage.errors import ImageError, LabelfleetError
from storage.objects.protocols import ObjectStore
from storage.review.queue import IMAGES, ReviewItem
from storage.runs.image_bytes import Fetched, read_images
from storage.runs.manifest import Manifest
from storage.shards.frames import split_frame
from workers.images.decode import decode
from workers.images.preprocessing import ValueRange, recorded_range
from workers.images.signatures import format_of

_MAX_PIXELS = 500_000_000
_SHOWN = {"PNG": "png", "WebP": "webp", "BMP": "bmp"}  # formats that browsers show as they are


@dataclass(slots=True)
class Copies:
    """What there is to show.

    Attributes:
        names: file name below ``review/images/`` by sha256.
        problems: why an image cannot be shown, by image_id.
        copied: made this time.
    """

    names: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    copied: int = 0


def copy_images(
    manifest: Manifest,
    source: ObjectStore,
    items: Sequence[ReviewItem],
    on_copied: Callable[[int], None] = lambda _count: None,
) -> Copies:
    """Copy what is not there yet.

    Args:
        manifest: the run, whose output takes the copies.
        source: where it was labelled from.
        items: the routed images.
        on_copied: called with the number of images that are done.
    """
    copies = Copies(names=existing(manifest))
    missing = [item for item in items if item.sha256 not in copies.names]
    on_copied(len(items) - len(missing))
    value_range = recorded_range(manifest.record.inference)
    for item, raw in read_images(manifest, source, missing):
        try:
            name, shown = showable(item, raw, value_range)
            manifest.store.put(f"{IMAGES}{name}", shown)
            copies.names[item.sha256] = name
            copies.copied += 1
        except LabelfleetError as exc:
            copies.problems[item.image_id] = exc.message
        on_copied(1)
    return copies


def existing(manifest: Manifest) -> dict[str, str]:
    """Return the existing copies: file name by sha256."""
    names = (o.key.removeprefix(IMAGES) for o in manifest.store.list(IMAGES))
    return {name.split(".")[0]: name for name in names}


def showable(item: ReviewItem, raw: Fetched, value_range: ValueRange = "full") -> tuple[str, bytes]:
    """File name and bytes that every browser shows upright.

    Raises:
        LabelfleetError: the bytes could not be had, or are not those that were labelled.
    """
    if isinstance(raw, LabelfleetError):
        raise raw
    if hashlib.sha256(raw).hexdigest() != item.sha256:
        raise ImageError("its bytes are not those that were labelled")
    kind, is_frame = format_of(raw), split_frame(raw)[1] > 1
    if kind == "JPEG" and not is_frame:
        return f"{item.sha256}.jpg", raw
    decoded = decode(raw, max_pixels=_MAX_PIXELS, value_range=value_range)
    # Browsers agree on EXIF in JPEG alone, and show the highest 8 bits of 16.
    as_labelled = kind != "PNG" or value_range == "full" or raw[24] <= 8
    # An animation would move under its boxes, and a frame is not what its file shows.
    as_labelled = as_labelled and decoded.frames == 1 and not is_frame
    if kind in _SHOWN and decoded.exif_orientation == 1 and as_labelled:
        return f"{item.sha256}.{_SHOWN[kind]}", raw
    ok, encoded = cv2.imencode(".png", decoded.pixels[:, :, ::-1])
    if not ok:
        raise ImageError("it could not be written as PNG")
    return f"{item.sha256}.png", bytes(encoded.tobytes())


def unseen(items: Sequence[ReviewItem], copies: Copies) -> Iterator[tuple[str, str]]:
    """(image_id, why) of the items that have no copy."""
    for item in items:
        if item.sha256 not in copies.names:
            yield item.image_id, copies.problems.get(item.image_id, "it was not copied")

"""A COCO-format set as the trainer reads it: files, boxes, classes, and regions to ignore.

Images without any box are kept: they teach what background is. Regions to ignore are places where
"no object" must not be taught: crowds (``iscrowd``), annotations with ``"ignore": 1``, those of
categories the caller names, and the entries ``{image_id, bbox}`` of an optional top-level list
``ignore``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from storage.boxes import clipped, has_area
from storage.coco.truth import Truth, TruthImage, read_truth
from storage.errors import ConfigError, SourceEmpty, SourceError
from storage.records import Xyxy

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
            are not classes of the model.

    Raises:
        ConfigError: the file is not COCO detection JSON, or a named category is not in it.
        ObjectNotFound: there is no such file.
        SourceError: an image is missing, unreadable, or has another size than annotated.
        SourceEmpty: without an image, or without a box to learn.
    """
    truth = read_truth(annotations)
    classes = _classes(truth, ignore_categories)
    read: list[TrainingImage] = []
    lost = truth.without_area
    for number in range(len(truth.images)):
        image, without_area = _image(truth, number, images, classes.index)
        read.append(image)
        lost += without_area
    _check_headers(read, images)
    found = TrainingSet(tuple(read), classes.names, classes.official_ids, lost)
    if found.objects == 0:
        raise SourceEmpty(
            f"{annotations}: {len(read)} images, but no box to learn",
            hint="check the annotations, and that not every category is ignored",
        )
    return found


@dataclass(frozen=True, slots=True)
class _Classes:
    """Classes to learn in the file's order; ``index`` holds -1 for ignored ones."""

    names: tuple[str, ...]
    official_ids: tuple[int, ...]
    index: dict[int, int]


def _classes(truth: Truth, ignore_categories: Sequence[str]) -> _Classes:
    names = list(truth.categories.values())
    unknown = sorted(set(ignore_categories) - set(names))
    if unknown:
        raise ConfigError(
            f"ignore_categories {unknown} are not in {truth.source}", hint=f"it has {names}"
        )
    learned = {i: name for i, name in truth.categories.items() if name not in ignore_categories}
    index = dict.fromkeys(truth.categories, -1)
    index.update({i: number for number, i in enumerate(learned)})
    return _Classes(tuple(learned.values()), tuple(learned), index)


def _image(
    truth: Truth, number: int, folder: Path, index: dict[int, int]
) -> tuple[TrainingImage, int]:
    """One image, and how many of its boxes do not lie in it."""
    image = truth.images[number]
    if not image.width or not image.height:
        raise ConfigError(
            f"{truth.source} states no width and height for {image.name!r}",
            hint="training checks each image against them; write both",
        )
    boxes, labels = [], []
    ignore = [(x, y, x + w, y + h) for x, y, w, h in truth.regions_of(number)]
    for box in truth.boxes[number]:
        label = index[box.category_id]
        if label < 0 or box.ignore:
            ignore.append(box.xyxy)
        else:
            boxes.append(box.xyxy)
            labels.append(label)
    inside, kept = _inside(boxes, image)
    made = TrainingImage(
        _on_disk(folder, image.name), image.name, image.width, image.height,
        inside, np.array(labels, np.int64)[kept], _inside(ignore, image)[0],
    )  # fmt: skip
    return made, int((~kept).sum())


def _on_disk(folder: Path, name: str) -> Path:
    """The image's file, also where it was written in another Unicode form of its name."""
    path = folder / name
    if name.isascii() or path.exists():
        return path
    forms = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((form for form in forms if form.exists()), path)


def _inside(
    xyxy: Sequence[Xyxy], image: TruthImage
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes clipped to the image, and which of the given ones have area there."""
    boxes = clipped(np.array(xyxy, np.float32).reshape(-1, 4), image.width, image.height)
    kept = has_area(boxes)
    return boxes[kept], kept


def _check_headers(images: Sequence[TrainingImage], folder: Path) -> None:
    """Check before the first step that every file exists and has the stated size."""
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

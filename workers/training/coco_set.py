"""A COCO-format set as the trainer reads it: files, boxes, classes, and regions to ignore.

Images without any box are kept: they teach what background is. Regions to ignore are places where
"no object" must not be taught: crowds (``iscrowd``), annotations with ``"ignore": 1``, those of
categories the caller names, and the entries ``{image_id, bbox}`` of an optional top-level list
``ignore``.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.boxes import clipped, has_area
from storage.coco.truth import Truth, TruthImage, read_truth
from storage.errors import ConfigError, ImageError, SourceEmpty, SourceError
from storage.records import Xyxy
from workers.images.decode import decode
from workers.images.preprocessing import ValueRange
from workers.training.augment import TrainingSample
from workers.training.usable import TrainingImage, find_faults


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """All images, the class names by contiguous index, and the ids the COCO file gives them.

    ``without_area`` counts annotations that were left out because nothing of them lies in the
    image. ``left_out`` names the images that cannot be
    used, each with the reason.
    """

    images: tuple[TrainingImage, ...]
    classes: tuple[str, ...]
    official_ids: tuple[int, ...]
    without_area: int
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def objects(self) -> int:
        """Boxes to learn, over all images."""
        return sum(len(image.labels) for image in self.images)

    @property
    def digest(self) -> str:
        """16 hex digits of the images that are drawn from, in their order."""
        names = "\0".join(image.file_name for image in self.images)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        """Return one image, decoded, upright. Raises SourceError: it cannot be read or decoded."""
        return load_sample(self.images[index], value_range)


def read_training_set(
    annotations: Path,
    images: Path,
    *,
    ignore_categories: Sequence[str] = (),
    max_bad_share: float = 0.0,
    checked: Path | None = None,
) -> TrainingSet:
    """Read a COCO JSON, decode every image file once, and check its size against the JSON.

    Args:
        annotations: COCO JSON with ``images``, ``annotations`` and ``categories``.
        images: folder that ``file_name`` is relative to.
        ignore_categories: names of categories whose boxes become regions to ignore, and which
            are not classes of the model.
        max_bad_share: share of the images that may be left out because they cannot be used.
        checked: file that remembers by digest which images were decoded; None: none.

    Raises:
        ConfigError: the file is not COCO detection JSON, or a named category is not in it.
        ObjectNotFound: the file does not exist.
        SourceError: more images than that are missing, damaged, or of another size than annotated.
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
    faults = find_faults(read, images, max_bad_share, checked)
    found = TrainingSet(
        tuple(one for one in read if one.file_name not in faults),
        classes.names,
        classes.official_ids,
        lost,
        tuple(faults.items()),
    )
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


def load_sample(image: TrainingImage, value_range: ValueRange = "full") -> TrainingSample:
    """Decode one training image, upright RGB, as a labelling run would.

    Raises:
        SourceError: it cannot be read or decoded.
    """
    try:
        # Decoded once, and its size compared with the annotations, when the set was read.
        decoded = decode(
            image.path.read_bytes(),
            max_pixels=image.width * image.height,
            value_range=value_range,
        )
    except (ImageError, OSError) as exc:
        raise SourceError(
            f"training image {image.path}: {exc}",
            hint="it could be read when the training began: has it changed since?",
        ) from exc
    return TrainingSample(decoded.pixels, image.boxes, image.labels, image.ignore)


def _on_disk(folder: Path, name: str) -> Path:
    """Return the image's file, also where it was written in another Unicode form of its name."""
    path = folder / name
    if name.isascii() or path.exists():
        return path
    forms = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((form for form in forms if form.exists()), path)


def _inside(
    xyxy: Sequence[Xyxy], image: TruthImage
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return boxes clipped to the image, and which of the given ones have area there."""
    boxes = clipped(np.array(xyxy, np.float32).reshape(-1, 4), image.width, image.height)
    kept = has_area(boxes)
    return boxes[kept], kept

"""A label version of a run as a training set: nothing is unpacked, images come from their shards.

Accepted boxes are learned with the probability that they are right as their weight, boxes of
people with weight 1; ignore boxes become regions to ignore. An image that people settled counts
as checked as a whole. Images without boxes stay: they teach what background is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from storage.errors import ImageError, SourceError
from storage.labels.images import StreamImages
from storage.labels.stream import ImageLabels, LabelIndex
from workers.images.decode import decode
from workers.images.preprocessing import ValueRange
from workers.training.augment import SoftTargets, TrainingSample


@dataclass(frozen=True, slots=True)
class LabelStream:
    """Implements ``Samples``.

    Attributes:
        index: the labels; ``images``: reads their images.
        classes, official_ids: of the training, by contiguous index.
        class_index: int64, the training's class of each class of the run; -1: its boxes are
            ignored.
        band: boxes that the policy left undecided become regions to ignore; False: background.
        silent: classes of the training whose absence the model's images do not teach, since too
            few of their objects are known there, and why. Images that people settled teach it.
    """

    index: LabelIndex
    images: StreamImages
    classes: tuple[str, ...]
    official_ids: tuple[int, ...]
    class_index: NDArray[np.int64]
    band: bool = True
    silent: Mapping[int, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hex digits of what decides the data."""
        rest: tuple[object, ...] = (self.classes, self.class_index.tolist(), self.band)
        if self.silent:  # else the digest is that of earlier versions
            rest += (sorted(self.silent),)
        text = repr((self.index.digest, rest))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def objects(self) -> int:
        """Boxes to learn, over all images."""
        return self.index.objects(self.class_index >= 0)

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        """Return one image, decoded, upright. Raises SourceError: it cannot be read or decoded."""
        labels = self.index.labels(index)
        return self.targets(labels, self._pixels(index, labels, value_range))

    def targets(self, labels: ImageLabels, pixels: NDArray[np.uint8]) -> TrainingSample:
        """Return an image's labels as the targets of a training."""
        learned = self.class_index[labels.category_ids]
        taken = ~labels.ignore & (learned >= 0)
        ignored = ~taken if self.band else labels.human & ~taken | (learned < 0)
        whole = np.array([[0, 0, labels.width, labels.height]], np.float32)
        return TrainingSample(
            pixels,
            labels.boxes[taken],
            learned[taken],
            labels.boxes[ignored],
            labels.weights[taken],
            self._soft(labels, taken),
            pseudo=not labels.by_people,
            checked=whole if labels.by_people else whole[:0],
            silent=self._silent(labels),
        )

    def _silent(self, labels: ImageLabels) -> NDArray[np.float32]:
        classes = () if labels.by_people else sorted(self.silent)
        rows = [[number, 0, 0, labels.width, labels.height] for number in classes]
        return np.array(rows, np.float32).reshape(-1, 5)

    def _soft(self, labels: ImageLabels, taken: NDArray[np.bool_]) -> SoftTargets | None:
        stored = labels.stored
        if stored is None:
            return None
        ids, values = stored.topk_ids[taken], stored.topk_scores[taken]
        scores = np.zeros((len(ids), len(self.classes)), np.float32)
        known = ids >= 0
        mapped = np.where(known, self.class_index[np.where(known, ids, 0)], -1)
        rows, places = np.nonzero(mapped >= 0)
        # Several classes of the run may be one class here: the likeliest speaks for it.
        np.maximum.at(scores, (rows, mapped[rows, places]), values[rows, places])
        scores[~known.any(axis=1)] = np.nan
        return SoftTargets(scores, stored.spread[taken], labels.human[taken])

    def _pixels(
        self, number: int, labels: ImageLabels, value_range: ValueRange
    ) -> NDArray[np.uint8]:
        raw = self.images.read(number)
        name = self.index.place(number).image_id
        try:
            pixels = decode(
                raw, max_pixels=labels.width * labels.height, value_range=value_range
            ).pixels
        except ImageError as exc:
            raise SourceError(f"training image {name}: {exc}") from exc
        if pixels.shape[:2] != (labels.height, labels.width):
            raise SourceError(
                f"training image {name} is {pixels.shape[1]}×{pixels.shape[0]} upright, "
                f"labelled as {labels.width}×{labels.height}",
                hint="it was decoded differently when it was labelled; label it again",
            )
        return pixels

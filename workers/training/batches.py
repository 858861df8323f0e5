"""Training batches as a pure function of (seed, step), prepared ahead by a few threads.

Because step 700's batch does not depend on steps 0–699 having been drawn, a resumed training sees
exactly the batches it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from storage.waiting import result_of
from workers.images.preprocessing import Preprocessing
from workers.training.augment import TrainingSample, augment, in_input_pixels
from workers.training.recipe.augmentation import Augmentation
from workers.training.recipe.mixing import mixup, mosaic
from workers.training.samples import Samples, drawn

_STRIDE = 32  # pixels of the coarsest anchors


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One step's input.

    Attributes:
        images: float32 [B, 3, H, W], contiguous, normalised as ``Preprocessing`` says.
        targets: float32 [N, 6]: batch index, class, cx, cy, w, h in input pixels.
        ignore: float32 [M, 5]: batch index, x1, y1, x2, y2 in input pixels.
        weights: float32 [N]: how much each target counts.
        checked: float32 [K, 5]: regions that people checked, laid out as ``ignore``.
        soft_scores: float32 [N, C]: stored class probabilities of each target, rows of NaN for
            boxes of people and where none are stored; None: no target has any.
        spread: float32 [N, 4]: standard deviations of left, top, right and bottom in input
            pixels as they would be without augmentation, NaN likewise; None: no target has any.
        silent: float32 [S, 6]: batch index, class, x1, y1, x2, y2 in input pixels: regions in
            which background does not count as a negative example of the class; None: no regions.
    """

    images: torch.Tensor
    targets: torch.Tensor
    ignore: torch.Tensor
    weights: torch.Tensor
    checked: torch.Tensor
    soft_scores: torch.Tensor | None = None
    spread: torch.Tensor | None = None
    silent: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BatchSource:
    """Draws and prepares the batches of a training.

    Attributes:
        augmentation: of images that people labelled; ``pseudo_augmentation`` of the others, None:
            the same.
        batch_size: images a step.
        seed: of order and augmentation; every epoch has its own order.
        threads: that decode and augment ahead of the training.
        mixed_steps: steps with mosaic and mixup; those from there on are without. None: all are
            with them.
        multi_scale: (low, high) factors on the input's size, drawn for each step; None: one size.
    """

    training_set: Samples
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    seed: int
    threads: int = 1
    pseudo_augmentation: Augmentation | None = None
    mixed_steps: int | None = None
    multi_scale: tuple[float, float] | None = None

    def batch(self, step: int) -> TrainingBatch:
        """TrainingBatch number ``step``, always the same one."""
        return self.part(step, 0, 1)

    def preprocessing_at(self, step: int) -> Preprocessing:
        """Return what the images of one step go through: their size may differ by step."""
        if self.multi_scale is None:
            return self.preprocessing
        factor = np.random.default_rng([self.seed, 5, step]).uniform(*self.multi_scale)
        return scaled_to(self.preprocessing, float(factor))

    def part(self, step: int, rank: int, world: int) -> TrainingBatch:
        """Slots ``rank``, ``rank + world``, … of batch number ``step``: one of ``world`` parts.

        Batch indices in targets and regions count within the part.
        """
        slots = range(rank, self.batch_size, world)
        samples = [self._sample(step, slot) for slot in slots]
        return collate(samples, self.preprocessing_at(step))

    def stream(
        self, first: int, end: int, rank: int = 0, world: int = 1
    ) -> Iterator[TrainingBatch]:
        """Part ``rank`` of ``world`` of batches ``first`` to ``end - 1`` in order, prepared a few
        steps ahead."""
        ahead = self.threads + 1
        waiting: deque[Future[TrainingBatch]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="batch")
        try:
            for step in range(first, end):
                waiting.append(pool.submit(self.part, step, rank, world))
                if len(waiting) > ahead:
                    yield result_of(waiting.popleft())
            while waiting:
                yield result_of(waiting.popleft())
        finally:  # without waiting for a source that may not answer
            pool.shutdown(wait=False, cancel_futures=True)

    def _sample(self, step: int, slot: int) -> TrainingSample:
        number = step * self.batch_size + slot
        sample = self._drawn(self.seed, number)
        augmentation = self._augmentation_of(sample)
        preprocessing = self.preprocessing_at(step)
        # A stream of its own: order and augmentation are as they are without mixing.
        rng = np.random.default_rng([self.seed, 3, step, slot])
        mosaic_drawn, mixup_drawn = rng.random(2) < (augmentation.mosaic, augmentation.mixup)
        closed = self.mixed_steps is not None and step >= self.mixed_steps
        if mosaic_drawn and not closed:
            four = [sample, *(self._partner(number, k) for k in range(3))]
            made = mosaic(four, preprocessing, [self._augmentation_of(s) for s in four], rng)
        else:
            own = np.random.default_rng([self.seed, 1, step, slot])
            made = augment(sample, preprocessing, augmentation, own)
        if mixup_drawn and not closed:
            other = self._partner(number, 3)
            second = augment(other, preprocessing, self._augmentation_of(other), rng)
            made = mixup(made, second, rng)
        return made

    def _partner(self, number: int, k: int) -> TrainingSample:
        """Return partner ``k`` of image ``number``, drawn by the same shares as images are."""
        seed = int(np.random.SeedSequence([self.seed, 4]).generate_state(1)[0])
        return self._drawn(seed, 4 * number + k)

    def _drawn(self, seed: int, number: int) -> TrainingSample:
        index = drawn(self.training_set, seed, number)
        sample = self.training_set.sample(index, self.preprocessing.value_range)
        return in_input_pixels(sample, self.preprocessing)

    def _augmentation_of(self, sample: TrainingSample) -> Augmentation:
        if sample.pseudo and self.pseudo_augmentation is not None:
            return self.pseudo_augmentation
        return self.augmentation


def scaled_to(preprocessing: Preprocessing, factor: float) -> Preprocessing:
    """Return ``preprocessing`` for an input ``factor`` as large, in whole strides of 32 pixels."""
    sides = [max(1, round(side * factor / _STRIDE)) * _STRIDE for side in preprocessing.size]
    margins = [a - b for a, b in zip(preprocessing.size, preprocessing.resize_to, strict=True)]
    inner = [side - margin for side, margin in zip(sides, margins, strict=True)]
    return replace(preprocessing, size=(sides[0], sides[1]), resize_to=(inner[0], inner[1]))


def collate(samples: list[TrainingSample], preprocessing: Preprocessing) -> TrainingBatch:
    """Stack network inputs; rows of targets and regions carry their batch index."""
    stacked = np.stack([s.pixels for s in samples])
    if preprocessing.channels == "BGR":
        stacked = stacked[..., ::-1]
    # ascontiguousarray: a transposed view would reach the network as channels_last, whose
    # backward corrupts memory on CPU (torch 2.13).
    planes = np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
    return TrainingBatch(
        _normalised(torch.from_numpy(planes), preprocessing),
        torch.from_numpy(np.concatenate([_targets(i, s) for i, s in enumerate(samples)])),
        torch.from_numpy(np.concatenate([_regions(i, s.ignore) for i, s in enumerate(samples)])),
        torch.from_numpy(np.concatenate([s.weights for s in samples])),
        torch.from_numpy(np.concatenate([_regions(i, s.checked) for i, s in enumerate(samples)])),
        *_stored(samples),
        torch.from_numpy(np.concatenate([_regions(i, s.silent) for i, s in enumerate(samples)])),
    )


def _normalised(planes: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    images = planes.float() * preprocessing.scale
    if preprocessing.mean is not None:
        images -= torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    if preprocessing.std is not None:
        images /= torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return images


def _targets(
    index: int, sample: TrainingSample
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    low, high = sample.boxes[:, :2], sample.boxes[:, 2:]
    where = np.full((len(low), 1), index, np.float32)
    label = sample.labels[:, None].astype(np.float32)
    return np.concatenate([where, label, (low + high) / 2, high - low], axis=1)


def _regions(
    index: int, regions: NDArray[np.float32]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.concatenate([np.full((len(regions), 1), index, np.float32), regions], axis=1)


def _stored(samples: list[TrainingSample]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return ``soft_scores`` and ``spread`` of a batch."""
    classes = next((s.soft.scores.shape[1] for s in samples if s.soft is not None), None)
    if classes is None:
        return None, None
    scores, spreads = [], []
    for sample in samples:
        count, soft = len(sample.boxes), sample.soft
        score = np.full((count, classes), np.nan, np.float32)
        spread = np.full((count, 4), np.nan, np.float32)
        if soft is not None:
            by_model = ~soft.human
            score[by_model], spread[by_model] = soft.scores[by_model], soft.spread[by_model]
        scores.append(score)
        spreads.append(spread)
    return torch.from_numpy(np.concatenate(scores)), torch.from_numpy(np.concatenate(spreads))

"""Training batches as a pure function of (seed, step), prepared ahead by a few threads.

Because step 700's batch does not depend on steps 0–699 having been drawn, a resumed training sees
exactly the batches it would have seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from workers.images.preprocessing import Preprocessing
from workers.training.augment import Augmentation, TrainingSample, augment
from workers.training.samples import Samples, drawn


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
            pixels, NaN likewise; None: no target has any.
    """

    images: torch.Tensor
    targets: torch.Tensor
    ignore: torch.Tensor
    weights: torch.Tensor
    checked: torch.Tensor
    soft_scores: torch.Tensor | None = None
    spread: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BatchSource:
    """Draws and prepares the batches of a training.

    Attributes:
        batch_size: images a step.
        seed: of order and augmentation; every epoch has its own order.
        threads: that decode and augment ahead of the training.
    """

    training_set: Samples
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    seed: int
    threads: int = 1

    def batch(self, step: int) -> TrainingBatch:
        """TrainingBatch number ``step``, always the same one."""
        return self.part(step, 0, 1)

    def part(self, step: int, rank: int, world: int) -> TrainingBatch:
        """Slots ``rank``, ``rank + world``, … of batch number ``step``: one of ``world`` parts.

        Batch indices in targets and regions count within the part.
        """
        slots = range(rank, self.batch_size, world)
        return collate([self._sample(step, slot) for slot in slots], self.preprocessing)

    def stream(
        self, first: int, end: int, rank: int = 0, world: int = 1
    ) -> Iterator[TrainingBatch]:
        """Part ``rank`` of ``world`` of batches ``first`` to ``end - 1`` in order, prepared a few
        steps ahead."""
        ahead = self.threads + 1
        waiting: deque[Future[TrainingBatch]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batch") as pool:
            try:
                for step in range(first, end):
                    waiting.append(pool.submit(self.part, step, rank, world))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _sample(self, step: int, slot: int) -> TrainingSample:
        index = drawn(self.training_set, self.seed, step * self.batch_size + slot)
        rng = np.random.default_rng([self.seed, 1, step, slot])
        return augment(
            self.training_set.sample(index, self.preprocessing.value_range),
            self.preprocessing,
            self.augmentation,
            rng,
        )


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

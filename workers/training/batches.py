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

from storage.errors import ImageError, SourceError
from workers.images.decode import decode
from workers.images.preprocessing import Preprocessing, ValueRange
from workers.training.augment import Augmentation, TrainingSample, augment
from workers.training.coco_set import TrainingSet
from workers.training.usable import TrainingImage


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One step's input.

    Attributes:
        images: float32 [B, 3, H, W], contiguous, normalised as ``Preprocessing`` says.
        targets: float32 [N, 6]: batch index, class, cx, cy, w, h in input pixels.
        ignore: float32 [M, 5]: batch index, x1, y1, x2, y2 in input pixels.
    """

    images: torch.Tensor
    targets: torch.Tensor
    ignore: torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchSource:
    """Draws and prepares the batches of a training.

    Attributes:
        batch_size: images a step.
        seed: of order and augmentation; every epoch has its own order.
        threads: that decode and augment ahead of the training.
    """

    training_set: TrainingSet
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    seed: int
    threads: int = 1

    def batch(self, step: int) -> TrainingBatch:
        """TrainingBatch number ``step``, always the same one."""
        return collate([self._sample(step, slot) for slot in range(self.batch_size)],
                       self.preprocessing)  # fmt: skip

    def stream(self, first: int, end: int) -> Iterator[TrainingBatch]:
        """Batches ``first`` to ``end - 1`` in order, prepared a few steps ahead."""
        ahead = self.threads + 1
        waiting: deque[Future[TrainingBatch]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="batch") as pool:
            try:
                for step in range(first, end):
                    waiting.append(pool.submit(self.batch, step))
                    if len(waiting) > ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _sample(self, step: int, slot: int) -> TrainingSample:
        images = self.training_set.images
        epoch, place = divmod(step * self.batch_size + slot, len(images))
        # A permutation of a few thousand numbers costs microseconds, less than keeping state.
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(images))
        rng = np.random.default_rng([self.seed, 1, step, slot])
        return augment(
            load_sample(images[order[place]], self.preprocessing.value_range),
            self.preprocessing,
            self.augmentation,
            rng,
        )


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


def collate(samples: list[TrainingSample], preprocessing: Preprocessing) -> TrainingBatch:
    """Stack network inputs; rows of ``targets`` and ``ignore`` carry their batch index."""
    stacked = np.stack([s.pixels for s in samples])
    if preprocessing.channels == "BGR":
        stacked = stacked[..., ::-1]
    # ascontiguousarray: a transposed view would reach the network as channels_last, whose
    # backward corrupts memory on CPU (torch 2.13).
    planes = np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
    return TrainingBatch(
        _normalised(torch.from_numpy(planes), preprocessing),
        torch.from_numpy(np.concatenate([_targets(i, s) for i, s in enumerate(samples)])),
        torch.from_numpy(np.concatenate([_regions(i, s) for i, s in enumerate(samples)])),
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
    index: int, sample: TrainingSample
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    where = np.full((len(sample.ignore), 1), index, np.float32)
    return np.concatenate([where, sample.ignore], axis=1)

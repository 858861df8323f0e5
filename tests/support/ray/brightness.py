"""A real, tiny detector: one box around the bright part of an image; no weights, no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import OutputNotFinite
from storage.records import Detections
from workers.images.preprocessing import Preprocessing


class BrightnessDetector:
    """Boxes what is brighter than 200; scores it by its mean. Fails where it is told to.

    Args:
        fail_on: a mean input brightness (rounded) that raises, as a poison image would.
        nan_on: a mean input brightness (rounded) for which the output is not finite.
        fail_always: everything raises, as a broken device would.
        most: batches larger than this raise, as a full device memory would.
    """

    def __init__(
        self,
        size: tuple[int, int] = (64, 64),
        *,
        fail_on: int | None = None,
        nan_on: int | None = None,
        fail_always: bool = False,
        most: int = 10**9,
    ) -> None:
        self.classes = ("dark", "bright")
        self.preprocessing = Preprocessing(size=size, resize_to=size)
        self.fail_on, self.fail_always, self.most = fail_on, fail_always, most
        self.nan_on = nan_on
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        """One detection an image."""
        self.gate.wait()
        if self.fail_always:
            raise RuntimeError("device lost")
        if len(batch) > self.most:
            raise MemoryError(f"batch of {len(batch)}")
        self.batches.append(len(batch))
        return [self._one(image) for image in batch]

    def start(self, batch: NDArray[np.uint8]) -> Callable[[], Sequence[Detections]]:
        """As ``detect``; nothing is left to do afterwards."""
        found = self.detect(batch)
        return lambda: found

    def _one(self, image: NDArray[np.uint8]) -> Detections:
        mean = float(image.mean())
        if self.fail_on is not None and round(mean) == self.fail_on:
            raise ValueError("poison")
        if self.nan_on is not None and round(mean) == self.nan_on:
            raise OutputNotFinite("not finite")
        ys, xs = np.nonzero(image.mean(2) > 127)
        x1, y1, x2, y2 = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else [0] * 4
        return Detections(
            boxes=np.array([[x1, y1, x2, y2]], np.float32),
            scores=np.array([mean / 255], np.float32),
            category_ids=np.array([mean > 127], np.int16),
            topk_ids=np.array([[0, 1]], np.int16),
            topk_scores=np.array([[0.5, 0.25]], np.float32),
            box_std=np.ones((1, 4), np.float32),
            box_entropy=np.ones(1, np.float32),
            anchor=np.zeros(1, np.int32),
        )


class QueueingBrightness(BrightnessDetector):
    """On a device of its own, that is a thread: it reads each batch as late as it can.

    Args:
        batch_s: what it takes for a batch.

    Attributes:
        happened: ``launch`` and ``wait`` as they came, with the number of the batch.
    """

    def __init__(self, *, batch_s: float = 0, **options: Any) -> None:
        super().__init__(**options)
        self.batch_s = batch_s
        self.device = ThreadPoolExecutor(1)
        self.happened: list[tuple[str, int]] = []
        self.launches = 0

    def empty(self, images: int) -> NDArray[np.uint8]:
        return np.empty((images, *self.preprocessing.size, 3), np.uint8)

    def start(self, batch: NDArray[np.uint8]) -> Callable[[], Sequence[Detections]]:
        found = self.device.submit(self.detect, batch).result()
        return lambda: found

    def _later(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        time.sleep(self.batch_s)
        return self.detect(batch)

    def launch(self, batch: NDArray[np.uint8]) -> Callable[[], Callable[[], Sequence[Detections]]]:
        number = self.launches
        self.launches += 1
        self.happened.append(("launch", number))
        running = self.device.submit(self._later, batch)

        def wait() -> Callable[[], Sequence[Detections]]:
            self.happened.append(("wait", number))
            found = running.result()
            return lambda: found

        return wait

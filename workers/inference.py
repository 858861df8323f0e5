"""Runs the detector on batches, and finds out whose fault it is when that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from storage.errors import ShardFailed, WorkerLost
from storage.records import Detections
from workers.batch_size import BatchSize
from workers.detector import Detector, TwoStepDetector

Results = list[Detections | ShardFailed]


class Inference:
    """One detector, used by one thread.

    Args:
        detector: what runs.
        batch: is told how long batches take, and which are too large for the device's memory.
    """

    def __init__(self, detector: Detector, batch: BatchSize) -> None:
        self._detector, self._batch = detector, batch

    def start(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> Callable[[], Results]:
        """Run the network; what is returned gives detections by image, or why one has none.

        Any thread may call it; where the detector takes two steps, NMS happens then.

        Args:
            pixels: uint8 [B, H, W, 3], as ``Detector.detect`` wants them.
            names: of the B images, for errors.

        Raises:
            WorkerLost: the detector is broken: not even a blank image works.
            MemoryError: there is none for a single image; none is to blame.
        """
        began_s = time.perf_counter()
        try:
            finish = self._start(pixels)
        except Exception:  # noqa: BLE001 - the model's border: find out whose fault it was
            alone = self._one_by_one(pixels, names)
            return lambda: alone
        self._batch.ran(len(pixels), time.perf_counter() - began_s)
        return lambda: list(finish())

    def _start(self, pixels: NDArray[np.uint8]) -> Callable[[], Sequence[Detections]]:
        if isinstance(self._detector, TwoStepDetector):
            return self._detector.start(pixels)
        found = self._detector.detect(pixels)
        return lambda: found

    def _one_by_one(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> Results:
        alone = [self._alone(pixels[i : i + 1], name) for i, name in enumerate(names)]
        if not any(isinstance(found, ShardFailed) for found in alone):
            self._batch.too_large(len(pixels))
        return alone

    def _alone(self, pixels: NDArray[np.uint8], name: str) -> Detections | ShardFailed:
        try:
            (detections,) = self._detector.detect(pixels)
            return detections
        except MemoryError:
            raise  # the worker's trouble: all images are of one size
        except Exception as exc:  # noqa: BLE001 - as above
            self._check_device(pixels)
            return ShardFailed(f"inference failed on {name!r}: {type(exc).__name__}: {exc}")

    def _check_device(self, pixels: NDArray[np.uint8]) -> None:
        """It was the image's fault, if a blank one still works; else the whole worker's."""
        try:
            self._detector.detect(np.zeros_like(pixels))
        except Exception as exc:
            raise WorkerLost(f"the detector is broken: {type(exc).__name__}: {exc}") from exc

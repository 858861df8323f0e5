"""Runs the detector on batches, and finds the cause when that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from storage.errors import OutputNotFinite, ShardFailed, WorkerLost
from storage.records import Detections
from workers.detectors.protocol import Detector, QueueingDetector, Unfinished
from workers.labelling.batch_size import BatchSize

Results = list[Detections | OutputNotFinite | ShardFailed]


@dataclass(frozen=True, slots=True)
class Inferred:
    """The network's output for one batch.

    Attributes:
        seconds: the network's time for it, without the wait for the batch before it.
        finish: runs NMS and gives detections by image, or why one has none: its shard's attempt
            failed, or the network has no finite output for it; any thread may call it.
    """

    seconds: float
    finish: Callable[[], Results]


class Inference:
    """One detector, used by one thread.

    Args:
        detector: what runs.
        batch: is told how long batches take, and which are too large for the device's memory.
    """

    def __init__(self, detector: Detector, batch: BatchSize) -> None:
        self._detector, self._batch = detector, batch
        # Once: looking for a protocol's members takes some 0.1 ms.
        self._queue = detector if isinstance(detector, QueueingDetector) else None
        self._ended_s = 0.0
        self._disturbed = False  # images ran one by one while the next batch was under way

    @property
    def queues(self) -> bool:
        """Whether another batch may be launched before the first one is waited for."""
        return self._queue is not None

    def empty(self, images: int) -> NDArray[np.uint8]:
        """uint8 [images, H, W, 3], uninitialised, for ``launch``. Any thread may call it."""
        if self._queue is not None:
            return self._queue.empty(images)
        return np.empty((images, *self._detector.preprocessing.size, 3), np.uint8)

    def launch(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> Callable[[], Inferred]:
        """Begin one batch; what is returned waits for the network, and is called once, in order.

        Args:
            pixels: uint8 [B, H, W, 3], as ``Detector.detect`` wants them; untouched until then.
            names: of the B images, for errors.

        Raises:
            WorkerLost: (as it waits) the detector is broken: not even a blank image works.
            MemoryError: (as it waits) there is none for a single image; none is to blame.
        """
        began_s = time.perf_counter()
        wait: Callable[[], Unfinished] = partial(self._detector.start, pixels)
        if self._queue is not None:
            try:
                wait = self._queue.launch(pixels)
            except Exception:  # noqa: BLE001 - the model's border: image by image it may work
                return lambda: self._one_by_one(pixels, names)
        return lambda: self._wait(wait, pixels, names, began_s)

    def _wait(
        self,
        wait: Callable[[], Unfinished],
        pixels: NDArray[np.uint8],
        names: Sequence[str],
        began_s: float,
    ) -> Inferred:
        try:
            unfinished = wait()
        except Exception:  # noqa: BLE001 - the model's border: find out whose fault it was
            return self._one_by_one(pixels, names)
        seconds = self._seconds_since(began_s)
        if not self._disturbed:
            self._batch.ran(len(pixels), seconds)
        self._disturbed = False
        return Inferred(seconds, lambda: list(unfinished()))

    def _seconds_since(self, began_s: float) -> float:
        """Time the batch that ends now; one launched early began when the one before it ended."""
        began_s, self._ended_s = max(began_s, self._ended_s), time.perf_counter()
        return self._ended_s - began_s

    def _one_by_one(self, pixels: NDArray[np.uint8], names: Sequence[str]) -> Inferred:
        began_s = time.perf_counter()
        self._disturbed = self.queues
        alone = [self._alone(pixels[i : i + 1], name) for i, name in enumerate(names)]
        # Once for all of them, after the last: what broke on the way is broken still.
        if any(isinstance(found, OutputNotFinite) for found in alone):
            self._check_device(pixels[:1])
        if all(isinstance(found, Detections) for found in alone):  # no image is to blame
            self._batch.too_large(len(pixels))
        return Inferred(self._seconds_since(began_s), lambda: alone)

    def _alone(
        self, pixels: NDArray[np.uint8], name: str
    ) -> Detections | OutputNotFinite | ShardFailed:
        try:
            (detections,) = self._detector.detect(pixels)
            return detections
        except MemoryError:
            raise  # the worker's trouble: all images are of one size
        except OutputNotFinite as exc:  # a second time: if a blank image works, it is the image
            return exc
        except Exception as exc:  # noqa: BLE001 - as above
            self._check_device(pixels)
            return ShardFailed(f"inference failed on {name!r}: {type(exc).__name__}: {exc}")

    def _check_device(self, pixels: NDArray[np.uint8]) -> None:
        """Blame the image if a blank one still works, else the worker."""
        try:
            self._detector.detect(np.zeros_like(pixels))
        except Exception as exc:
            raise WorkerLost(f"the detector is broken: {type(exc).__name__}: {exc}") from exc

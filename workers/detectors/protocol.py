"""The Detector protocol: what ShardLabeller needs of a model, whatever it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from storage.records import Detections
from workers.images.preprocessing import Preprocessing

Unfinished = Callable[[], Sequence[Detections]]


class Detector(Protocol):
    """A loaded model on one device. Not thread-safe: one thread calls ``detect`` and ``start``."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by contiguous category id."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """What the caller must do to an image before ``detect``."""
        ...

    def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        """Run one batch.

        Args:
            batch: uint8 [B, H, W, 3], RGB, letterboxed to ``preprocessing.size``; any B >= 1.

        Returns:
            B results, boxes in pixels of the letterboxed input, NMS done.
        """
        ...

    def start(self, batch: NDArray[np.uint8]) -> Unfinished:
        """Run the network on one batch, as ``detect`` does, and leave the rest to the caller.

        Returns:
            What gives the B results; any thread may call it, and as late as it likes: the batch
            and the device are not needed any more, so the next batch need not wait for NMS.
        """
        ...


@runtime_checkable
class QueueingDetector(Detector, Protocol):
    """A Detector on a device of its own, which works while its caller brings the next batch."""

    def empty(self, images: int) -> NDArray[np.uint8]:
        """uint8 [images, H, W, 3], uninitialised, in memory that the device reads at full speed.
        Any thread may call it."""
        ...

    def launch(self, batch: NDArray[np.uint8]) -> Callable[[], Unfinished]:
        """Queue one batch behind the one that runs, and return; two may be under way.

        Returns:
            What waits for the device and then is as ``start``; to be called once, in the order of
            the launches. ``batch`` must stay as it is until then. ``detect`` may be called between
            its failing and the wait for the batch behind it.
        """
        ...

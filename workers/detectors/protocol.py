"""The Detector protocol: what ShardLabeller needs of a model, whatever it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from storage.records import Detections

__all__ = ["Detections", "Detector", "Preprocessing", "QueueingDetector", "TwoStepDetector"]

Unfinished = Callable[[], Sequence[Detections]]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an upright RGB image becomes the network's input; geometry on the CPU, the rest inside.

    The defaults are those of the COCO weights in super-gradients' ``predict()``: longest side to
    ``size - 4``, pad to ``size`` around the centre with 114, divide by 255, RGB.

    Attributes:
        size: (height, width) of the network input in pixels.
        resize_to: (height, width) the image is scaled to fit into, keeping its aspect.
        keep_aspect: False stretches it to ``resize_to`` instead (super-gradients'
            DetectionRescale).
        padding: ``center`` or ``bottom_right``.
        pad_value: 0–255, for all three channels.
        channels: order the network was trained on.
        scale: the factor on uint8 values, applied inside the network.
        mean, std: per channel in the network's order, after ``scale``; None when not used.
    """

    size: tuple[int, int] = (640, 640)
    resize_to: tuple[int, int] = (636, 636)
    padding: Literal["center", "bottom_right"] = "center"
    pad_value: int = 114
    channels: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    keep_aspect: bool = True


class Detector(Protocol):
    """A loaded model on one device. Not thread-safe: one thread calls ``detect``."""

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


@runtime_checkable
class TwoStepDetector(Detector, Protocol):
    """A Detector whose device need not wait for the NMS of one batch to begin the next."""

    def start(self, batch: NDArray[np.uint8]) -> Unfinished:
        """Run the network on one batch, as ``detect`` does, and leave the rest to the caller.

        Returns:
            What gives the B results; any thread may call it, and as late as it likes: the batch
            and the device are not needed any more.
        """
        ...


@runtime_checkable
class QueueingDetector(TwoStepDetector, Protocol):
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

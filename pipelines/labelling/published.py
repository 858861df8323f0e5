"""Published speeds of the YOLO-NAS networks, for an estimate before anything was measured.

The source is the latency table of YOLO-NAS's README in super-gradients (Deci 2023): TensorRT, 640 ×
640 pixels, batches of one, the network alone. A pipeline also fetches, decodes and writes, so the
hours that follow are the least that a run on such a GPU can take. No figure for other GPUs was
published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SOURCE = "the README of YOLO-NAS (Deci 2023): TensorRT, 640 × 640, the network alone"


@dataclass(frozen=True, slots=True)
class PublishedSpeed:
    """Milliseconds an image that a network takes on a GPU."""

    model: str
    gpu: str
    precision: str
    milliseconds: float

    def hours(self, images: int) -> float:
        """Return the hours that one GPU needs for a number of images."""
        return images * self.milliseconds / 3_600_000


SPEEDS = tuple(
    PublishedSpeed(model, "NVIDIA T4", precision, milliseconds)
    for model, by_precision in {
        "yolo_nas_s": {"fp16": 3.21, "int8": 2.36},
        "yolo_nas_m": {"fp16": 5.85, "int8": 3.78},
        "yolo_nas_l": {"fp16": 7.87, "int8": 4.78},
    }.items()
    for precision, milliseconds in by_precision.items()
)


def published_lines(model: str | None, images: int, price: float | None) -> Iterator[str]:
    """Yield a sentence for people for each published speed of a network.

    Args:
        model: its name; None: not known, and nothing is said.
        images: to label.
        price: of a GPU an hour; None: no cost is told.
    """
    for speed in SPEEDS:
        if speed.model == model:
            hours = speed.hours(images)
            cost = "" if price is None else f", {hours * price:.2f} at price_per_gpu_hour"
            yield (
                f"published, not measured: {speed.milliseconds:g} ms an image on one {speed.gpu} "
                f"in {speed.precision} ({SOURCE}), so at least {hours:.2f} hours{cost}"
            )

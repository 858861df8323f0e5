"""How pixels become network input: size, letterbox, channels, scale, tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.errors import ConfigError

_LATER: dict[str, Any] = {
    "interpolation": "linear",
    "antialias": False,
    "rounding": "nearest",
    "value_range": "full",
    "flip": False,
}

DecodeMode = Literal["exact", "fast"]

ValueRange = Literal["full", "data"] | tuple[float, float]
"""Which sample values become black and white in images of more than 8 bits a sample: the whole
range of their type, the least and largest value of the image, or two given values."""


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
        interpolation: of the resize.
        scale: the factor on uint8 values, applied inside the network.
        antialias: whether pixels are averaged where the image shrinks, as Pillow does it.
        rounding: of the resized sides to whole pixels.
        mean, std: per channel in the network's order, after ``scale``; None when not used.
        decode: ``exact`` decodes a JPEG whole, as ``predict()`` and the trainer do; ``fast`` at a
            half, a quarter or an eighth where the network sees it that small.
        value_range: what becomes black and white where samples have more than 8 bits.
        flip: whether the network sees the image mirrored left to right, inside the same padding.
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
    interpolation: Literal["linear", "cubic", "nearest"] = "linear"
    antialias: bool = False
    rounding: Literal["nearest", "down"] = "nearest"

    decode: DecodeMode = "exact"
    value_range: ValueRange = "full"
    flip: bool = False

    def fields(self) -> dict[str, Any]:
        """Return plain values. Fields that were added later are left out at their default, so that
        older records still compare equal."""
        values = asdict(self)
        for name, default in _LATER.items():
            if values[name] == default:
                del values[name]
        return values


def recorded_range(inference: Mapping[str, Any]) -> ValueRange:
    """Return the value range that a run's record (``inference`` in run.json) states.

    Raises ConfigError where it states none that there is.
    """
    said = (inference.get("preprocessing") or {}).get("value_range", "full")
    if said in ("full", "data"):
        return "data" if said == "data" else "full"
    try:
        low, high = said
        return float(low), float(high)
    except (TypeError, ValueError, OverflowError) as exc:
        raise ConfigError(f"run.json states the value range {said!r:.60}") from exc


_LARGEST = 8192  # pixels a side; a typing error would otherwise ask for terabytes


def check_preprocessing(found: Preprocessing) -> None:
    """Raise ValueError or TypeError if a field has the wrong type or is out of range."""
    for name, (height, width) in (("size", found.size), ("resize_to", found.resize_to)):
        if not all(type(v) is int and 0 < v <= _LARGEST for v in (height, width)):
            raise ValueError(f"{name} is {height} × {width}")
    if found.resize_to[0] > found.size[0] or found.resize_to[1] > found.size[1]:
        raise ValueError(f"images are resized to {found.resize_to} and padded to {found.size}")
    if found.padding not in ("center", "bottom_right") or found.channels not in ("RGB", "BGR"):
        raise ValueError(f"padding is {found.padding}, channels are {found.channels}")
    if type(found.pad_value) is not int or not 0 <= found.pad_value <= 255:
        raise ValueError(f"pad_value is {found.pad_value}")
    if found.interpolation not in ("linear", "cubic", "nearest"):
        raise ValueError(f"interpolation is {found.interpolation}")
    if found.rounding not in ("nearest", "down"):
        raise ValueError(f"rounding is {found.rounding}")
    if found.antialias and found.interpolation == "nearest":
        raise ValueError("interpolation nearest has no antialias")
    numbers = [found.scale, *(found.mean or (0.0,) * 3), *(found.std or (1.0,) * 3)]
    if len(numbers) != 7 or not all(math.isfinite(float(n)) for n in numbers):
        raise ValueError("scale, mean and std must be finite, mean and std for three channels")
    if found.decode not in ("exact", "fast"):
        raise ValueError(f"decode is {found.decode!r}")
    _check_range(found.value_range)
    if type(found.flip) is not bool:
        raise ValueError(f"flip is {found.flip!r}")
    if found.scale <= 0 or not all(s > 0 for s in found.std or ()):
        raise ValueError("scale and std must be positive")


def _check_range(value_range: ValueRange) -> None:
    if value_range in ("full", "data"):
        return
    if isinstance(value_range, str) or len(value_range) != 2:
        raise ValueError(f"value_range is {value_range!r}")
    low, high = (float(v) for v in value_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range is {value_range!r}: the first must be below the second")


@dataclass(frozen=True, slots=True)
class View:
    """Another look of the same model at the same image, whose boxes are those of the image.

    Attributes:
        flip: mirror the image left to right.
        scale: size of the image in the network, relative to what the model is used to.
    """

    flip: bool = False
    scale: float = 1.0

    def of(self, usual: Preprocessing, *, step: int | None) -> Preprocessing:
        """Return the preprocessing of this view.

        Args:
            usual: the model's own.
            step: the network takes inputs whose sides are multiples of it, and its input shrinks
                or grows with the image. None: the input's size is fixed, and a smaller image gets
                more padding.

        Raises:
            ValueError: the input's size is fixed and the image would grow, or it would be larger
                than any input may be.
        """
        if self.scale == 1:
            return replace(usual, flip=self.flip)
        fit_height, fit_width = (max(1, round(side * self.scale)) for side in usual.resize_to)
        height, width = usual.size
        if step is not None:
            height, width = (math.ceil(side * self.scale / step) * step for side in usual.size)
        elif self.scale > 1:
            raise ValueError(f"scale {self.scale:g}: this network's input is of a fixed size")
        seen = replace(
            usual, size=(height, width), resize_to=(fit_height, fit_width), flip=self.flip
        )
        check_preprocessing(seen)
        return seen

    def in_words(self) -> str:
        """Return the view for people."""
        mirrored = ["mirrored"] if self.flip else []
        scaled = [f"at {self.scale:g} of the usual size"] if self.scale != 1 else []
        return ", ".join(mirrored + scaled)


@dataclass(frozen=True, slots=True)
class Window:
    """A part of an upright image, in its pixels."""

    x: int
    y: int
    width: int
    height: int

    def of(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return its pixels [height, width, 3], as a view."""
        return pixels[self.y : self.y + self.height, self.x : self.x + self.width]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How images larger than a tile are split.

    Attributes:
        size: a tile's sides in pixels of the image.
        overlap: the share of a tile that its neighbour repeats, 0 to below 1.
        whole: whether the network also sees the image as a whole, for objects larger than a tile.
    """

    size: int = 640
    overlap: float = 0.2
    whole: bool = True

    def windows(self, width: int, height: int) -> list[Window]:
        """Return the parts of an image, row by row, the whole of it last; one where it fits a tile.

        The last tile of a row or column lies at the border and overlaps more, as SAHI's do.
        """
        image = Window(0, 0, width, height)
        if max(width, height) <= self.size:
            return [image]
        parts = [
            Window(x, y, min(self.size, width), min(self.size, height))
            for y in self._starts(height)
            for x in self._starts(width)
        ]
        return [*parts, image] if self.whole else parts

    def _starts(self, length: int) -> list[int]:
        step = max(1, self.size - int(self.overlap * self.size))
        last = max(0, length - self.size)
        return [*range(0, last, step), last]


def as_yaml(found: Preprocessing) -> str:
    """Return the line of a config that states the steps most often different."""
    place = "center" if found.padding == "center" else "top_left"
    size, fit = list(found.size), list(found.resize_to)
    return (
        f"preprocessing: {{size: {size}, fit: {fit}, place: {place}, pad_value: {found.pad_value}, "
        f"channels: {found.channels}}}"
    )

"""How strongly training images are varied."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How strongly training images are varied.

    Attributes:
        flip_horizontal, flip_vertical: probabilities.
        scale: (low, high) factors on the letterbox scale, drawn log-uniformly.
        shift: 0 keeps the letterbox position, 1 allows any within the free or cut-off margin.
        brightness, contrast, saturation: largest relative change.
        hue_deg: largest rotation of the hue circle (360°).
        rotate_deg, shear_deg: largest turn, and largest shear along each axis, either way.
        blur: probability; ``blur_px`` is the largest standard deviation in input pixels.
        mosaic: probability that an image shares the input with three others.
        mosaic_scale: (low, high) factors on ``scale`` in a mosaic.
        mixup: probability that the input is blended with another.
    """

    flip_horizontal: float = 0.5
    flip_vertical: float = 0.0
    scale: tuple[float, float] = (0.7, 1.5)
    shift: float = 1.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.3
    hue_deg: float = 6.0
    rotate_deg: float = 0.0
    shear_deg: float = 0.0
    blur: float = 0.0
    blur_px: float = 1.5
    mosaic: float = 0.0
    mosaic_scale: tuple[float, float] = (0.5, 1.0)
    mixup: float = 0.0

    @staticmethod
    def none() -> Augmentation:
        """Return the plain letterbox."""
        return Augmentation(0.0, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0)

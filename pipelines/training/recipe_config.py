"""Config sections of the recipe: how images are varied, and how fast which part learns."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from pipelines.config.part import Part

Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0, le=100)]


class PseudoAugmentConfig(Part):
    """Augmentation of images that a model labelled: each value given here replaces `augment`'s."""

    scale: tuple[float, float] | None = Field(None, description="As `augment.scale`.")
    brightness: Share | None = Field(None, description="As `augment.brightness`.")
    contrast: Share | None = Field(None, description="As `augment.contrast`.")
    saturation: Share | None = Field(None, description="As `augment.saturation`.")
    hue_deg: float | None = Field(None, ge=0, le=180, description="As `augment.hue_deg`.")
    rotate_deg: float | None = Field(None, ge=0, le=45, description="As `augment.rotate_deg`.")
    shear_deg: float | None = Field(None, ge=0, le=30, description="As `augment.shear_deg`.")
    blur: Share | None = Field(None, description="As `augment.blur`.")
    blur_px: float | None = Field(None, gt=0, le=16, description="As `augment.blur_px`.")
    mosaic: Share | None = Field(None, description="As `augment.mosaic`.")
    mixup: Share | None = Field(None, description="As `augment.mixup`.")

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if value is None else _ordered(value)


class AugmentConfig(Part):
    """Augmentation of training images."""

    flip_horizontal: Share = Field(0.5, description="Probability. 0 where left and right differ.")
    flip_vertical: Share = Field(0.0, description="Probability.")
    scale: tuple[float, float] = Field((0.7, 1.5), description="Factors on the letterbox scale.")
    shift: Share = Field(1.0, description="1: anywhere in the frame; 0: as inference places it.")
    brightness: Share = Field(0.2, description="Largest relative change.")
    contrast: Share = Field(0.2, description="Largest relative change.")
    saturation: Share = Field(0.3, description="Largest relative change.")
    hue_deg: float = Field(6.0, ge=0, le=180, description="Largest turn of the hue circle.")
    rotate_deg: float = Field(0.0, ge=0, le=45, description="Largest turn, either way.")
    shear_deg: float = Field(0.0, ge=0, le=30, description="Largest shear along x and along y.")
    blur: Share = Field(0.0, description="Probability of a Gaussian blur.")
    blur_px: float = Field(
        1.5, gt=0, le=16, description="Largest standard deviation of the blur, in input pixels."
    )
    mosaic: Share = Field(
        0.0, description="Probability that an image is shown beside three others, in a 2×2 mosaic."
    )
    mosaic_scale: tuple[float, float] = Field(
        (0.5, 1.0), description="Factors on `scale` for the images of a mosaic."
    )
    mixup: Share = Field(
        0.0, description="Probability that an image is blended with another, boxes of both kept."
    )
    close_mosaic: Share = Field(
        0.1, description="Share of the steps, at the end, without mosaic and mixup."
    )
    pseudo: PseudoAugmentConfig = Field(
        PseudoAugmentConfig(), description="What differs for images that a model labelled."
    )

    @field_validator("scale", "mosaic_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _ordered(value)


class LrFactorsConfig(Part):
    """Factors on the learning rate of each part of the network, for fine-tuning."""

    backbone: Factor = Field(1.0, description="Of stem, stages and context module.")
    neck: Factor = Field(1.0, description="Of the layers that join the scales.")
    heads: Factor = Field(1.0, description="Of the class and box outputs.")


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not 0.1 <= value[0] <= value[1] <= 10:
        raise ValueError("write [low, high] with 0.1 ≤ low ≤ high ≤ 10")
    return value


class StageConfig(Part):
    """One of several trainings in a row: a name, and the fields of a training that differ in it."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="Names the stage's folder below `output/stages`."
    )

    @property
    def differing(self) -> dict[str, Any]:
        """The fields given beside the name, as they were written."""
        return dict(self.model_extra or {})

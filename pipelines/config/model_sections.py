"""Sections of ``model:`` that state how a network wants its images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.part import Part
from workers.images.preprocessing import Preprocessing, check_preprocessing

Side = Annotated[int, Field(ge=1, le=8192)]
Triple = tuple[float, float, float]


def network_size(value: int | tuple[int, int]) -> int | tuple[int, int]:
    """A YOLO-NAS input size as it is given. Raises ValueError when a side is not one of its."""
    for side in value if isinstance(value, tuple) else (value,):
        if side % 32 or not 32 <= side <= 4096:
            raise ValueError(f"{side} is not a multiple of 32 between 32 and 4096")
    return value


class PreprocessingConfig(Part):
    """What an upright RGB image goes through on its way into the network, all of it."""

    size: Side | tuple[Side, Side] = Field(
        640, description="Network input in pixels, one side or [h, w]."
    )
    resize: Literal["letterbox", "stretch"] = Field(
        "letterbox", description="Keep the aspect and pad, or stretch."
    )
    fit: Side | tuple[Side, Side] | None = Field(
        None, description="The image is scaled into this, one side or [h, w]; none: `size`."
    )
    place: Literal["center", "top_left"] = Field(
        "center", description="Where the letterboxed image lies; the rest is padding."
    )
    pad_value: Annotated[int, Field(ge=0, le=255)] = Field(114, description="Of the padding.")
    channels: Literal["RGB", "BGR"] = Field("RGB", description="Order the network wants.")
    scale: float = Field(1 / 255, gt=0, description="Factor on pixel values from 0 to 255.")
    mean: Triple | None = Field(
        None, description="Subtracted after `scale`, in the network's channel order."
    )
    std: Triple | None = Field(None, description="Divided by after `mean`.")

    @model_validator(mode="after")
    def _usable(self) -> PreprocessingConfig:
        self.preprocessing()
        return self

    @field_validator("std")
    @classmethod
    def _positive(cls, value: Triple | None) -> Triple | None:
        if value is not None and min(value) <= 0:
            raise ValueError("three numbers above 0 are expected")
        return value

    def preprocessing(self) -> Preprocessing:
        """As the worker layer wants it. Raises ValueError when the fields do not fit together."""
        size = _pair(self.size)
        found = Preprocessing(
            size=size,
            resize_to=_pair(self.fit) if self.fit is not None else size,
            keep_aspect=self.resize == "letterbox",
            padding="center" if self.place == "center" else "bottom_right",
            pad_value=self.pad_value,
            channels=self.channels,
            scale=self.scale,
            mean=self.mean,
            std=self.std,
        )
        check_preprocessing(found)
        return found


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)

"""Sections of ``model:`` that state how a network expects its images."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.part import Part
from workers.images.preprocessing import Preprocessing, Tiles, View, check_preprocessing
from workers.spec import Convention

Side = Annotated[int, Field(ge=1, le=8192)]
Triple = tuple[float, float, float]
_MOST_OVERLAP = 0.9  # each image pixel is then labelled a hundred times


def network_size(value: int | tuple[int, int]) -> int | tuple[int, int]:
    """Return a YOLO-NAS input size unchanged. Raises ValueError when it does not support a side."""
    for side in value if isinstance(value, tuple) else (value,):
        if side % 32 or not 32 <= side <= 4096:
            raise ValueError(f"{side} is not a multiple of 32 between 32 and 4096")
    return value


class PreprocessingConfig(Part):
    """Every step that takes an upright RGB image into the network."""

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
        "center", description="Position of the letterboxed image; the rest is padding."
    )
    pad_value: Annotated[int, Field(ge=0, le=255)] = Field(114, description="Of the padding.")
    channels: Literal["RGB", "BGR"] = Field("RGB", description="Order the network wants.")
    scale: float = Field(1 / 255, gt=0, description="Factor on pixel values from 0 to 255.")
    mean: Triple | None = Field(
        None, description="Subtracted after `scale`, in the network's channel order."
    )
    std: Triple | None = Field(None, description="Divided by after `mean`.")
    interpolation: Literal["linear", "cubic", "nearest"] = Field(
        "linear", description="Of the resize."
    )
    antialias: bool = Field(
        False, description="Average pixels where the image shrinks, as Pillow and torchvision do."
    )

    rounding: Literal["nearest", "down"] = Field(
        "nearest", description="Of the resized sides to whole pixels."
    )

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

    def preprocessing(self, base: Preprocessing | None = None) -> Preprocessing:
        """Convert to the worker layer's type. Raises ValueError where fields contradict.

        Args:
            base: has the fields that the config does not state; None: they have their defaults.
        """
        size = _pair(self.size)
        fields: dict[str, dict[str, Any]] = {
            "size": {"size": size, "resize_to": size},
            "fit": {"resize_to": size if self.fit is None else _pair(self.fit)},
            "resize": {"keep_aspect": self.resize == "letterbox"},
            "place": {"padding": "center" if self.place == "center" else "bottom_right"},
        }
        same = ("pad_value", "channels", "scale", "mean", "std", "interpolation", "antialias")
        fields |= {name: {name: getattr(self, name)} for name in (*same, "rounding")}
        changes: dict[str, Any] = {}
        for name, change in fields.items():
            if base is None or name in self.model_fields_set:
                changes |= change
        found = replace(base or Preprocessing(), **changes)
        check_preprocessing(found)
        return found


class TilesConfig(Part):
    """Split large images into overlapping tiles of the network's input size."""

    size: Annotated[int, Field(ge=32, le=16_384)] = Field(
        640, description="Sides of a tile in pixels of the image; smaller images stay whole."
    )
    overlap: float = Field(
        0.2, ge=0, description="Share of a tile that its neighbour repeats, below 1."
    )
    whole: bool = Field(
        True, description="Also label the image as a whole, for objects larger than a tile."
    )

    @model_validator(mode="after")
    def _advancing(self) -> TilesConfig:
        if self.overlap > 1:
            raise ValueError(
                f"an overlap of {self.overlap:g} is no share of a tile: {_MOST_OVERLAP} of its "
                f"{self.size} px is the most, and 0.2 stands for {0.2 * self.size:.0f} px"
            )
        if self.overlap > _MOST_OVERLAP:
            raise ValueError(
                f"tiles of {self.size} px that overlap by {self.overlap * self.size:g} px: an "
                f"overlap of at most {_MOST_OVERLAP} of a tile is possible"
            )
        return self

    def tiles(self) -> Tiles:
        """Convert to the worker layer's type."""
        return Tiles(self.size, self.overlap, self.whole)


class ViewConfig(Part):
    """Label another view of each image, as a run of its own to fuse with others."""

    flip: bool = Field(False, description="Mirror the image left to right.")
    scale: float = Field(
        1.0,
        ge=0.25,
        le=2,
        description="Size of the image in the network, relative to the usual; above 1 for YOLO-NAS "
        "only.",
    )

    @model_validator(mode="after")
    def _different(self) -> ViewConfig:
        if not self.flip and self.scale == 1:
            raise ValueError("it changes nothing: `flip: true`, or a `scale` other than 1")
        return self

    def view(self) -> View:
        """Convert to the worker layer's type."""
        return View(self.flip, self.scale)


FamilyName = Literal["yolo_nas", "yolox", "d-fine", "rt-detr", "rf-detr"]


class FamilyConfig(Part):
    """The convention of an ONNX graph: what goes in, and what its outputs mean."""

    base: Literal["yolox", "d-fine", "rt-detr", "rf-detr"] | None = Field(
        None, description="Begin with this family's convention; none: state all of it."
    )
    input: PreprocessingConfig | None = Field(
        None, description="What images go through; what it leaves out is as `base` has it."
    )
    layout: Literal["joined", "joined_transposed", "separate", "labelled", "rows"] | None = Field(
        None,
        description="Outputs. joined: [B, N, 4 + objectness + C]; separate: boxes [B, N, 4] and "
        "scores [B, N, C]; labelled: labels, boxes and scores; rows: [B, N, 6] with score, label.",
    )
    boxes: Literal["xyxy", "xywh", "cxcywh", "grid"] | None = Field(
        None, description="Format of a box; grid: YOLOX's, still to be decoded on its cells."
    )
    units: Literal["pixels", "shares"] | None = Field(
        None, description="Of boxes: pixels of the network's input, or shares of its sides."
    )
    scores: Literal["probabilities", "logits", "softmax_logits"] | None = Field(
        None, description="logits: a sigmoid is still to be taken; softmax_logits: a softmax."
    )
    objectness: bool | None = Field(None, description="A column before the classes' that counts.")
    background: Literal["none", "first", "last"] | None = Field(
        None, description='Which class column means "no object".'
    )
    slots: Literal["contiguous", "coco"] | None = Field(
        None, description="Class columns by their order, or by COCO's official ids."
    )
    nms: bool | None = Field(None, description="Boxes of one object are still to be merged.")
    size_input: Literal["none", "width_height", "height_width"] | None = Field(
        None, description="A second input int64 [B, 2] with the size of the network's input."
    )
    strides: tuple[Annotated[int, Field(ge=1, le=512)], ...] | None = Field(
        None, description="Of the cells of `boxes: grid`, in their order."
    )

    @model_validator(mode="after")
    def _whole(self) -> FamilyConfig:
        missing = [
            name
            for name in ("input", "layout", "boxes", "units", "scores")
            if self.base is None and getattr(self, name) is None
        ]
        if missing:
            raise ValueError(f"without `base` it needs {', '.join(missing)}")
        return self

    def convention(self, base: Convention | None) -> Convention:
        """Return the stated fields over those of ``base``."""
        given = {
            name: value
            for name, value in self.model_dump(exclude={"base", "input"}).items()
            if value is not None
        }
        if given.get("size_input") == "none":
            given["size_input"] = None
        return Convention(**given) if base is None else replace(base, **given)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)

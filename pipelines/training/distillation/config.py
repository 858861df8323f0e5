"""The section ``distill`` of a training's config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config.part import Part

Weight = Annotated[float, Field(ge=0, le=1000)]


class DistillConfig(Part):
    """What the student learns from a teacher beside its labels."""

    mode: Literal["stored", "teacher"] = Field(
        description="stored: the class scores and the spread of the sides that a label version "
        "keeps of its boxes. teacher: a frozen model sees the student's own images at every step."
    )
    teacher: str | None = Field(
        None,
        description="The teacher's checkpoint, path or URL: any width and depth, with the "
        "student's classes, input, strides and reg_max.",
    )
    weight: Weight = Field(
        1.0, description="Of distillation beside the ordinary loss, at the first step."
    )
    final_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of `weight` at the last step, reached on a cosine; none: 0.01 with a "
        "teacher, and 1, a constant weight, for stored knowledge.",
    )
    class_weight: Weight = Field(1.0, description="Of the class scores.")
    box_weight: Weight = Field(2.5, description="Of the boxes; a teacher's only.")
    side_weight: Weight = Field(0.5, description="Of the DFL distributions of the sides.")
    top_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of an image's anchors that a teacher adds by its confidence.",
    )

    @model_validator(mode="after")
    def _has_a_teacher(self) -> DistillConfig:
        if (self.mode == "teacher") != (self.teacher is not None):
            raise ValueError(
                "mode: teacher needs `teacher`, the path of a checkpoint"
                if self.teacher is None
                else "mode: stored learns from the labels; leave `teacher` out"
            )
        return self

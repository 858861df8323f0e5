"""The config of ``labelfleet round``: parsed once, frozen; unknown keys are errors.

What a step shares with a command is written as that command's config has it: ``run`` takes the
fields of a run, ``train`` and ``student`` those of a training. They are checked before the first
step starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.files import refuse_below_a_file
from pipelines.config.part import Name, Part, Place, Share, Url
from pipelines.config.run_config import (
    ModelConfig,
    PolicyConfig,
    ReviewConfig,
    SourceConfig,
    StorageConfig,
)
from pipelines.config.yaml_files import overridden_yaml, parse_config
from pipelines.training.config import DataConfig, refuse_absent

ROUND_PAGE = "docs/round_configuration.md"
Skippable = Literal["gate", "fit", "review", "evaluate", "compile"]
# What the round itself decides about a run and about a training.
_OF_RUN = ("name", "source", "output", "review", "gate", "policy")
_OF_TRAINING = ("name", "output", "val", "test")


class FitPart(Part):
    """How the thresholds that turn boxes into labels are fitted."""

    precision: Share = Field(0.9, description="Share of accepted boxes that shall be right.")
    lost: Share = Field(0.02, description="Largest share of right boxes that may be dropped.")
    ignore_area: Share | None = Field(
        None,
        description="Largest share of the image area between the thresholds, where the student "
        "learns nothing; none: not bounded.",
    )
    guarantee: Share | None = Field(
        None, description="Share of accepted boxes to be proven right; none: no guarantee."
    )
    confidence: Share = Field(0.9, description="Confidence of the guarantee.")
    force: bool = Field(False, description="Use a policy that `fit` would refuse as too imprecise.")


class ReviewPart(ReviewConfig):
    """People: what they see, and whether the round waits for them."""

    wait: bool = Field(
        True, description="Wait until every pushed image is answered or skipped; false: go on."
    )


class FinishPart(Part):
    """The quantization-aware finish of a student that loses too much in int8."""

    steps: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Optimiser steps; none: a tenth of the student's, from 50 to 2,000.",
    )
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate; none: a twentieth of the student's."
    )


class CompilePart(Part):
    """The student's artefact for inference."""

    precision: Literal["fp32", "fp16", "int8"] = Field("int8", description="As model.precision.")
    runtime: Literal["auto", "onnx", "openvino", "tensorrt"] = Field(
        "auto", description="As model.runtime."
    )
    max_loss: float = Field(
        0.5, ge=0, le=100, description="Points of mAP that int8 may cost; more is reported."
    )
    finish: FinishPart | None = Field(
        FinishPart(),
        description="A short quantization-aware training where int8 loses more than max_loss; "
        "null: none.",
    )


class RoundConfig(Part):
    """A round."""

    name: Name = Field(description="Letters, digits, `.`, `_`, `-`; also the student's file name.")
    output: Place = Field(
        description="Folder, or s3://, gs:// or az:// URL for everything it leaves."
    )
    pool: SourceConfig = Field(description="The unlabelled images, as `source` of a run.")
    truth: DataConfig = Field(description="The labelled images: teacher and student learn them.")
    test: DataConfig = Field(description="Held out: teacher and student are compared on it.")
    val: DataConfig | None = Field(
        None,
        description="Chooses the checkpoints and fits the thresholds; none: a fifth of `truth`, "
        "which is then not trained on.",
    )
    previous: Url | None = Field(
        None, description="Output of an earlier round, whose student is the teacher."
    )
    teacher: ModelConfig | None = Field(
        None, description="The teacher, as `model` of a run; none: it is trained on `truth`."
    )
    train: dict[str, Any] = Field(
        {}, description="Fields of a training, for teacher and student: steps, model, augment …"
    )
    student: dict[str, Any] = Field(
        {}, description="Fields of a training that differ for the student, such as `distill`."
    )
    truth_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the student's images that come from `truth`."
    )
    run: dict[str, Any] = Field(
        {}, description="Fields of a run for labelling: workers, model.runtime, max_hours …"
    )
    gate: Share | None = Field(
        None, description="mAP on `val` that the teacher must reach; none: no gate."
    )
    fit: FitPart = Field(FitPart(), description="The thresholds.")
    policy: PolicyConfig | Url = Field(
        PolicyConfig(), description="The thresholds where the step fit is skipped."
    )
    review: ReviewPart | None = Field(None, description="People; none: the round has none.")
    compile: CompilePart | None = Field(
        CompilePart(), description="The student's artefact; null: none is made."
    )
    skip: tuple[Skippable, ...] = Field((), description="Steps to leave out.")
    storage: StorageConfig = Field(StorageConfig(), description="How S3 is reached.")
    work: str | None = Field(
        None,
        description="Local folder for trainings under way; none: the output where it is local, "
        "else the cache.",
    )

    @field_validator("run", "train", "student")
    @classmethod
    def _not_ours(cls, value: dict[str, Any], info: Any) -> dict[str, Any]:
        taken = _OF_RUN if info.field_name == "run" else (*_OF_TRAINING, "train")
        if wrong := [key for key in taken if key in value]:
            raise ValueError(f"the round itself sets {', '.join(wrong)}: leave it out here")
        return value

    @model_validator(mode="after")
    def _one_teacher(self) -> RoundConfig:
        if self.previous is not None and self.teacher is not None:
            raise ValueError("give either previous or teacher: both say who the teacher is")
        return self

    def skips(self, step: str) -> str:
        """Return why a step is left out; '' where it is not."""
        part = "review" if step in ("route", "push", "pull") else step
        if part in self.skip:
            return f"skip lists {part}"
        absent = {
            "gate": self.gate is None,
            "review": self.review is None,
            "compile": self.compile is None,
        }
        return f"the config has no `{part}`" if absent.get(part) else ""


def load_round_config(path: str, overrides: Sequence[str] = ()) -> RoundConfig:
    """Read a round's config; ``overrides`` are ``key.sub=value`` texts.

    Raises:
        ConfigError: naming the file, the key, what is wrong and the nearest valid key.
    """
    fields = overridden_yaml(path, overrides, ROUND_PAGE, command="round")
    config = parse_config(RoundConfig, fields, where=path, page=ROUND_PAGE)
    sets = {"truth": config.truth, "test": config.test, "val": config.val}
    teacher, policy = config.teacher, config.policy
    files = {
        "teacher.checkpoint": None if teacher is None else teacher.checkpoint,
        "teacher.arch": None if teacher is None else teacher.arch,
        "policy": policy if isinstance(policy, str) else None,
        "pool.keys": config.pool.keys,
        "review.gold_truth": None if config.review is None else config.review.gold_truth,
        "run.model.arch": _text(config.run, "model", "arch"),
        **{
            f"{role}.{part}.{key}": _text(section, part, key)
            for role, section in (("train", config.train), ("student", config.student))
            for part, key in (("model", "checkpoint"), ("model", "arch"), ("distill", "teacher"))
        },
    }
    given = {name: part for name, part in sets.items() if part is not None}
    refuse_absent(path, given, files, config.storage.options())
    refuse_below_a_file("output", config.output)
    return config


def _text(section: Mapping[str, Any], part: str, key: str) -> str | None:
    """Return a file's name from fields that are parsed later; None where there is none."""
    fields = section.get(part)
    value = fields.get(key) if isinstance(fields, Mapping) else None
    return value if isinstance(value, str) else None

"""A training in stages, such as pretrain and finetune, as a chain of plain trainings.

Each stage is the config with the stage's own fields in place, and starts from the weights that the
stage before it kept. The last stage writes to ``output`` itself, as a training without stages
does; the others write to ``output/stages/<name>``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from pipelines.config.yaml_files import parse_config
from pipelines.training.config import TRAIN_PAGE, TrainConfig
from pipelines.training.sources import label_digests, pinned
from pipelines.training.start import Machine, resolve_machine
from pipelines.training.summary import FILE_NAME, TrainSummary
from storage.errors import ConfigError

STATE_NAME = "state.pt"
_FOLDER = "stages"
# A stage is another training of the same model: these are the same in all of them.
_WHOLE = (
    "name",
    "output",
    "model",
    "test",
    "stages",
    "device",
    "threads",
    "padding",
    "range",
    "workers",
    "report",
    "storage",
)
_MERGED = ("augment", "lr_factors", "distill")  # sections of which a stage may give a part


@dataclass(frozen=True, slots=True)
class Stage:
    """One training of the chain; ``name`` is empty where the config has no stages."""

    name: str
    config: TrainConfig


@dataclass(frozen=True, slots=True)
class MarkedStage:
    """A stage on this machine.

    Attributes:
        config: names the label versions that are learned, also where it was written `latest`.
        fingerprint: names all that decides its weights, the stages before it included.
        config_fingerprint: the same without the data.
    """

    name: str
    config: TrainConfig
    machine: Machine
    fingerprint: str
    config_fingerprint: str


def marked_stages(config: TrainConfig) -> tuple[MarkedStage, ...]:
    """Return the trainings that ``config`` stands for, each with its fingerprint.

    Raises:
        ConfigError: as ``stages_of``, or this machine lacks what one of them asks for.
    """
    made: list[MarkedStage] = []
    for stage in stages_of(config):
        made.append(_marked(stage, made[-1] if made else None))
    return tuple(made)


def _marked(stage: Stage, former: MarkedStage | None) -> MarkedStage:
    machine = resolve_machine(stage.config)
    marked, read = stage.config, pinned(stage.config)
    resolved: dict[str, Any] = {"precision": machine.precision}
    of_config = dict(resolved)
    if former is not None:
        # The path of the former's checkpoint moves with the output; what made it does not.
        model = marked.model.model_copy(update={"checkpoint": None})
        marked = marked.model_copy(update={"model": model})
        resolved["after"] = former.fingerprint
        of_config["after"] = former.config_fingerprint
    labels = label_digests(read)

    def marks(*, by_path: bool) -> tuple[str, str]:
        return (
            marked.fingerprint(labels=labels, by_path=by_path, **resolved),
            marked.fingerprint(data=False, by_path=by_path, **of_config),
        )

    found = marks(by_path=False)
    if marked.model.checkpoint is not None:
        earlier, begun = marks(by_path=True), marks_at(stage.config.output)
        if not begun.isdisjoint(earlier):
            found = earlier
    return MarkedStage(stage.name, read, machine, *found)


def marks_at(output: Path) -> set[str]:
    """Return the fingerprints of the training that an output holds; none: it holds none."""
    found: set[Any] = set()
    with suppress(OSError, ValueError, TypeError, AttributeError):
        found.add(json.loads((output / FILE_NAME).read_text()).get("fingerprint"))
    with suppress(OSError, RuntimeError, ValueError, AttributeError, UnpicklingError):
        saved = torch.load(output / STATE_NAME, map_location="cpu", weights_only=True, mmap=True)
        found |= {saved.get("fingerprint"), saved.get("config")}
    return {one for one in found if isinstance(one, str)}


def stage_record(name: str, summary: TrainSummary) -> dict[str, Any]:
    """Return what the summary and the checkpoint of the last stage say about an earlier one."""
    return {
        "name": name,
        "steps": summary.steps,
        "best_step": summary.best_step,
        "mAP": summary.val.map_,
        "seconds": summary.seconds,
        "images": summary.images,
        "sha256": summary.sha256,
        "fingerprint": summary.fingerprint,
    }


def stages_of(config: TrainConfig, *, where: str = "the config") -> tuple[Stage, ...]:
    """Return the trainings that ``config`` stands for, in order; itself where it has no stages.

    Raises:
        ConfigError: two stages share a name, or a field of a stage is unknown, invalid, or the
            same in all stages.
    """
    if not config.stages:
        return (Stage("", config),)
    names = [stage.name for stage in config.stages]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{where}: two stages are named {max(names, key=names.count)}",
            hint="give each stage its own name",
        )
    written = config.model_dump(exclude_unset=True, exclude={"stages"})
    made: list[Stage] = []
    for number, stage in enumerate(config.stages):
        fields = _merged(written, stage.differing, f"{where}: stage {stage.name}")
        if number:
            before = made[-1].config
            kept = before.output / f"{before.name}.safetensors"
            fields["model"] = {**fields.get("model", {}), "checkpoint": str(kept)}
        if number < len(names) - 1:
            # The sets of the end are measured at the end.
            fields.update(output=config.output / _FOLDER / stage.name, test={})
        made.append(Stage(stage.name, _parsed(fields, f"{where}: stage {stage.name}")))
    return tuple(made)


def _merged(written: Mapping[str, Any], differing: Mapping[str, Any], where: str) -> dict[str, Any]:
    fixed = [name for name in differing if name in _WHOLE]
    if fixed:
        raise ConfigError(
            f"{where}: {fixed[0]} is the same in all stages", hint="set it outside of `stages`"
        )
    fields = dict(written)
    if {"steps", "epochs"} & differing.keys():
        fields.pop("steps", None)
        fields.pop("epochs", None)
    for name, value in differing.items():
        if name in _MERGED and isinstance(value, dict):
            value = {**(fields.get(name) or {}), **value}
        fields[name] = value
    return fields


def _parsed(fields: dict[str, Any], where: str) -> TrainConfig:
    """Return one stage's config. Raises ConfigError: it is invalid, or an annotation file lacks."""
    config = parse_config(TrainConfig, fields, where=where, page=TRAIN_PAGE)
    for path in config.annotation_files:
        if not path.is_file():
            raise ConfigError(
                f"{where}: {path} is not there",
                hint="paths are relative to the folder the command is started in",
            )
    return config

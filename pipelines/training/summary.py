"""The summary of a finished training, as JSON and for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.plural import counted
from pipelines.training.validation import Scores
from storage.errors import ConfigError

FILE_NAME = "summary.json"


_JSON_NAMES = {"map_": "mAP", "map50": "mAP50", "map75": "mAP75", "ar": "AR"}


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a finished training left.

    Attributes:
        checkpoint: the .safetensors file; ``nbytes`` and ``sha256`` are its own.
        parameters: trainable values of the network.
        images, objects: of the training set.
        steps, best_step: all, and the one whose averaged weights were kept.
        val: of the kept weights before rounding to fp16; ``test`` of the file itself.
        history: (step, loss, validation mAP).
        seconds: training and validating, over all invocations.
        machine: what it ran on.
        fingerprint: of config, annotations and precision: equal ones continue each other.
        stages: of a training in stages, what each stage before the last left.
        extended_at: the step at which it was given more steps; 0: it was not.
        left_out: images that could not be used, and why, by the set's name and the image's.
        boxes_dropped: annotations without area in their image, by the set's name.
        silent: classes whose absence a label version does not teach, and why, by its source.
    """

    name: str
    checkpoint: str
    sha256: str
    nbytes: int
    parameters: int
    classes: tuple[str, ...]
    images: int
    objects: int
    steps: int
    best_step: int
    val: Scores
    test: dict[str, Scores]
    history: list[tuple[int, float, float]]
    seconds: float
    machine: dict[str, str]
    fingerprint: str
    extended_at: int = 0
    stages: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    boxes_dropped: dict[str, int] = field(default_factory=dict)
    silent: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values, under COCO's customary names (mAP, mAP50, mAP75, AR)."""
        plain = asdict(self)
        plain["val"] = _renamed(plain["val"], _JSON_NAMES)
        plain["test"] = {name: _renamed(s, _JSON_NAMES) for name, s in plain["test"].items()}
        return plain

    @staticmethod
    def from_json(fields: dict[str, Any]) -> TrainSummary:
        """Read what ``to_fields`` gave, in this version or earlier ones (``map_``, ``map50``, …).

        Raises KeyError, TypeError or ValueError for anything else.
        """
        fields_of = {shown: name for name, shown in _JSON_NAMES.items()}
        fields = dict(fields)
        fields["classes"] = tuple(fields["classes"])
        fields["val"] = Scores(**_renamed(fields["val"], fields_of))
        fields["test"] = {
            name: Scores(**_renamed(scores, fields_of)) for name, scores in fields["test"].items()
        }
        fields["history"] = [tuple(entry) for entry in fields["history"]]
        return TrainSummary(**fields)


def _renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}


def read_finished(output: Path, fingerprint: str) -> TrainSummary | None:
    """Return the summary of the same training, if it is done. Raises ConfigError for another's."""
    path = output / FILE_NAME
    if not path.exists():
        return None
    try:
        summary = TrainSummary.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as exc:
        raise ConfigError(f"{path} is not a training's summary", hint="delete it") from exc
    if summary.fingerprint != fingerprint:
        raise ConfigError(
            f"{output} holds a finished training with another config or other annotations",
            hint="choose another output",
        )
    checkpoint = output / Path(summary.checkpoint).name
    # A summary without its file is worthless; the output may have been moved with both.
    return replace(summary, checkpoint=str(checkpoint)) if checkpoint.exists() else None


def training_table(summary: TrainSummary) -> RenderableType:
    """Return a table of the scores, and where the checkpoint is."""
    table = Table("set", "images", "objects", "mAP", "mAP50", "mAP75", "AR", box=None)
    for name, s in {"val": summary.val, **summary.test}.items():
        figures = (f"{value:.3f}" for value in (s.map_, s.map50, s.map75, s.ar))
        table.add_row(name, str(s.images), str(s.objects), *figures)
    parameters, size = summary.parameters / 1e6, summary.nbytes / 1e6
    kept = f"step {summary.best_step} of {summary.steps}, {parameters:.2f}M parameters"
    if summary.extended_at:
        kept += f", extended at step {summary.extended_at}"
    last = Text(f"{summary.checkpoint}  ({size:.1f} MB, {kept})")
    lines = [*_stage_lines(summary), *_dropped_lines(summary), *_silent_lines(summary)]
    return Group(table, *(Text(line) for line in lines), Text(), last)


def _stage_lines(summary: TrainSummary) -> Iterator[str]:
    for stage in summary.stages:
        yield (
            f"stage {stage['name']}: {stage['steps']} steps, val mAP {stage['mAP']:.3f} "
            f"at step {stage['best_step']}"
        )


def _dropped_lines(summary: TrainSummary) -> Iterator[str]:
    """Yield what of the data was not used, a line a set; ``summary.json`` has every name."""
    for part, faults in summary.left_out.items():
        first = next(iter(faults.values()))
        yield f"{part}: {counted(len(faults), 'image')} left out, such as {first}"
    for part, count in summary.boxes_dropped.items():
        yield f"{part}: {counted(count, 'box', 'boxes')} left out, without area in their image"


def _silent_lines(summary: TrainSummary) -> Iterator[str]:
    """Yield which classes a label version is silent about, a line a class."""
    for source, classes in summary.silent.items():
        for name, why in classes.items():
            yield f"{source}: images that people did not settle are silent about {name}: {why}"

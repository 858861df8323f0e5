"""How runs are fused, and what the fused run's run.json says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import numpy as np

from pipelines.fusion.inputs import FusionInput, calibration_of, class_map
from storage.errors import ConfigError
from storage.objects.protocols import ObjectStore
from storage.records import RunIdentity
from storage.runs.manifest import Manifest, RunRecord, config_hash, distinct_names
from storage.shards.frames import FRAMES_KEY

FUSION_VERSION = 1


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """How runs are fused.

    Attributes:
        name: of the fused run; '': the runs' names, joined; `2xcells` of two runs named cells.
        iou: boxes that overlap by more are one object.
        weights: how much each run counts; empty: all alike.
        renamed: class names of later runs by the first run's; '' leaves a class out.
        calibrated: use the calibration that ``fit`` left with a run.
        score_floor: fused boxes below it are dropped.
        max_boxes: of an image at most, the highest scores.
    """

    name: str = ""
    iou: float = 0.55
    weights: tuple[float, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    calibrated: bool = True
    score_floor: float = 0.01
    max_boxes: int = 300


def check_runs(runs: Sequence[Manifest], output: ObjectStore, options: FuseOptions) -> None:
    """Raise ConfigError where these runs cannot be fused by these options."""
    urls = [run.url for run in runs]
    if len(urls) < 2:
        raise ConfigError("one run alone cannot be fused", hint="name two or more runs")
    if twice := [url for url, n in Counter(urls).items() if n > 1]:
        raise ConfigError(f"{twice[0]} is given twice", hint="name each run once")
    if output.url in urls:
        raise ConfigError(f"{output.url} is one of the runs", hint="choose another --out")
    if options.weights and len(options.weights) != len(runs):
        raise ConfigError(
            f"{len(options.weights)} weights for {len(runs)} runs", hint="one --weight for each run"
        )
    if any(not weight > 0 for weight in options.weights):
        raise ConfigError("a run with weight 0 or less", hint="leave the run out instead")


def inputs_of(runs: Sequence[Manifest], options: FuseOptions) -> list[FusionInput]:
    """Return the runs as fusion sees them. Raises ConfigError where their classes do not fit."""
    classes = [c.name for c in runs[0].record.identity.categories]
    every = {c.name for run in runs for c in run.record.identity.categories}
    if strange := [name for name in options.renamed if name not in every]:
        raise ConfigError(
            f"--map names a class that none of the runs has: {strange[0]}",
            hint=f"they have {', '.join(sorted(every))}",
        )
    weights = options.weights or (1.0,) * len(runs)
    inputs = []
    for run, weight, shown in zip(runs, weights, distinct_names(runs), strict=True):
        to_fused = class_map(run, classes, {} if run is runs[0] else options.renamed)
        knows = np.isin(np.arange(len(classes)), to_fused)
        calibration = calibration_of(run) if options.calibrated else None
        inputs.append(FusionInput(run, to_fused, knows, calibration, weight, shown))
    return inputs


def fused_record(inputs: Sequence[FusionInput], options: FuseOptions) -> RunRecord:
    """Return the run.json of the fused run: its settings are all that moves a fused box."""
    first = inputs[0].manifest.record
    name = options.name or _default_name([run.name for run in inputs])
    settings: dict[str, Any] = {
        "name": f"fusion of {' and '.join(run.name for run in inputs)}",
        "fusion": {
            "version": FUSION_VERSION,
            "method": "weighted boxes fusion",
            "iou": options.iou,
            "one_vote": True,
            "max_boxes": options.max_boxes,
            "runs": [run.settings() for run in inputs],
        },
        "score_floor": options.score_floor,
    }
    for limit in ("max_image_bytes", FRAMES_KEY):
        if limit in first.inference:
            settings[limit] = first.inference[limit]
    digest = config_hash(settings)
    identities = [run.manifest.record.identity for run in inputs]
    identity = RunIdentity(
        name=name,
        config_hash=digest,
        model_sha256=sha256(f"labelfleet fusion {digest}".encode()).hexdigest(),
        licence=_joined([one.licence for one in identities]),
        runtime="fusion",
        precision=_joined([one.precision for one in identities]),
        code_version=version("labelfleet"),
        categories=first.identity.categories,
    )
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    return RunRecord(identity, first.source, settings, created_at, tuple(_remarks(inputs)))


def _default_name(names: Sequence[str]) -> str:
    """Return the names, joined; one that several runs have stands once, with their number."""
    return "+".join(name if n == 1 else f"{n}x{name}" for name, n in Counter(names).items())


def _joined(values: Sequence[str]) -> str:
    return " + ".join(dict.fromkeys(values))


def _remarks(inputs: Sequence[FusionInput]) -> Iterator[str]:
    yield "fused from " + ", ".join(run.manifest.url for run in inputs)
    raw = [run.shown for run in inputs if run.calibration is None]
    if raw:
        yield (
            f"scores that count as they are, not calibrated: {', '.join(raw)} "
            "(`labelfleet fit` leaves a calibration with a run)"
        )
    classes = [c.name for c in inputs[0].manifest.record.identity.categories]
    for run in inputs[1:]:
        lacking = [name for name, known in zip(classes, run.knows, strict=True) if not known]
        if lacking:
            yield f"{run.shown} does not know, and does not vote on: {', '.join(lacking)}"

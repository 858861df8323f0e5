"""What a round cost: machine time and people's time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.rounds.state import StepRecord
from storage.review.answers import Answer
from storage.runs.ledger import invocations, read_ledger
from storage.runs.manifest import Manifest

_LONGEST_S = 1800.0  # an open tab over lunch is not work


@dataclass(frozen=True, slots=True)
class Costs:
    """Totals of a round.

    Attributes:
        machine_hours: wall time of the steps that people take no part in.
        gpu_hours: GPUs times the hours that they were held.
        human_minutes: between opening a task and submitting it, as Label Studio measured it.
        by_step: hours by step.
    """

    machine_hours: float
    gpu_hours: float
    human_minutes: float
    by_step: dict[str, float]

    def to_fields(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def costs_of(records: Iterable[StepRecord]) -> Costs:
    """Add up what the steps recorded."""
    by_step: dict[str, float] = {}
    gpu_s = minutes = 0.0
    for one in records:
        by_step[one.step] = one.seconds / 3600
        gpu_s += one.result.get("gpu_seconds", one.gpus * one.seconds)
        minutes += float(one.result.get("human_minutes", 0.0))
    return Costs(sum(by_step.values()), gpu_s / 3600, minutes, by_step)


def gpu_seconds(manifest: Manifest) -> float:
    """Return the GPUs of a labelling run times the seconds that they were held."""
    total = 0.0
    for invocation in invocations(manifest.store):
        gpus = first = last = 0.0
        for entry in read_ledger(manifest.store, invocation):
            if entry.event == "start":
                first, gpus = entry.at, float(entry.note.get("gpus", 0.0))
            last = max(last, entry.at)
        total += gpus * max(0.0, last - first) if first else 0.0
    return total


def human_minutes(answers: Iterable[Answer]) -> float:
    """Add up how long people took; an answer without a time counts none."""
    return sum(min(a.lead_time_s or 0.0, _LONGEST_S) for a in answers) / 60

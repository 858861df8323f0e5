"""One round: from a teacher, over labels, to a student and a page, step by step.

    teacher → gate → label → fit → route → push → pull → decide
            → student → evaluate → compile → page

Each step is what a command of its own does; this module decides which is due, records how it ended,
and goes on where an earlier invocation stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from rich.console import Console

from pipelines.config.source import check_places, listed_objects
from pipelines.dispatch.tally import Caller
from pipelines.models.compile import has_gpu
from pipelines.rounds import page
from pipelines.rounds.costs import Costs, costs_of
from pipelines.rounds.models import check_models, is_due
from pipelines.rounds.round_config import RoundConfig
from pipelines.rounds.state import STEPS, Repeat, StepName, StepRecord, refuse_unknown_steps
from pipelines.rounds.steps import compiling, machine, people, student, teacher
from pipelines.rounds.work import RoundWork
from pipelines.training.start import check_fits, resolve_machine
from storage.errors import ConfigError, LabelfleetError, WaitingForPeople
from storage.runs.lock import run_lock

Fields = dict[str, Any]
_WITH_RAY = ("label", "fit", "evaluate")
_STAND_IN = {"checkpoint": "teacher.safetensors"}  # while there is no teacher yet
_ON_GPUS = ("teacher", "gate", "student", "compile")


@dataclass(frozen=True, slots=True)
class Step:
    """A step: what decides its result, and how it is taken."""

    inputs: Callable[[RoundWork, StepRecord], Fields]
    take: Callable[[RoundWork, StepRecord], Fields]


_TABLE: dict[StepName, Step] = {
    "teacher": Step(teacher.teacher_inputs, teacher.take_or_train),
    "gate": Step(machine.gate_inputs, machine.check_teacher),
    "label": Step(machine.label_inputs, machine.label_pool),
    "fit": Step(machine.fit_inputs, machine.fit_thresholds),
    "route": Step(people.route_inputs, people.route_pool),
    "push": Step(people.push_inputs, people.push_queue),
    "pull": Step(people.pull_inputs, people.pull_answers),
    "decide": Step(people.decide_inputs, people.decide_labels),
    "student": Step(student.student_inputs, student.train_student),
    "evaluate": Step(student.evaluate_inputs, student.evaluate_both),
    "compile": Step(compiling.compile_inputs, compiling.compile_student),
    "page": Step(page.page_inputs, page.write_page),
}


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """Where a round stands after an invocation.

    Attributes:
        steps: the records, in order.
        new: steps that this invocation finished.
        left: steps that are not over yet.
        page: its URL; None before it was written.
        verdict: the result in one sentence; '' before the evaluation.
    """

    name: str
    output: str
    steps: tuple[StepRecord, ...]
    new: tuple[StepName, ...]
    left: tuple[StepName, ...]
    page: str | None
    verdict: str
    costs: Costs

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        brief = {
            one.step: {
                "status": one.status, "attempt": one.attempt, "seconds": round(one.seconds, 1),
                "reason": one.reason,
            }
            for one in self.steps
        }  # fmt: skip
        by_step = {one.step: one.result for one in self.steps}
        return {
            "name": self.name,
            "output": self.output,
            "page": self.page,
            "verdict": self.verdict,
            "comparison": by_step.get("evaluate", {}).get("comparison"),
            "student": by_step.get("student", {}).get("model"),
            "licence": by_step.get("student", {}).get("licence"),
            "version": by_step.get("decide", {}).get("version"),
            "int8": compiling.int8_of(by_step.get("compile", {})),
            "steps": brief,
            "new": list(self.new),
            "left": list(self.left),
            "costs": self.costs.to_fields(),
        }


@dataclass(frozen=True, slots=True)
class Selection:
    """Which steps an invocation takes.

    Attributes:
        only: this one alone. until: all up to this one.
        again: steps to repeat, with the later ones whose inputs change by it.
    """

    only: StepName | None = None
    until: StepName | None = None
    again: tuple[StepName, ...] = ()

    def steps(self) -> tuple[StepName, ...]:
        """Return them in order."""
        if self.only is not None:
            return (self.only,)
        return STEPS if self.until is None else STEPS[: STEPS.index(self.until) + 1]


def selection_of(only: str | None, until: str | None, again: Sequence[str]) -> Selection:
    """Return the steps that a command names. Raises ConfigError for one that there is not."""
    refuse_unknown_steps(only, until, again)
    return Selection(
        cast(StepName | None, only),
        cast(StepName | None, until),
        cast(tuple[StepName, ...], (*again,)),
    )


def run_round(
    config: RoundConfig,
    selection: Selection | None = None,
    *,
    address: str | None = None,
    caller: Caller | None = None,
    console: Console | None = None,
) -> RoundSummary:
    """Take the steps that are due. The same call continues a round that was stopped or killed.

    Args:
        config: the round.
        selection: None: all steps.
        address: of a Ray cluster for labelling; None: RAY_ADDRESS, else a local Ray.
        caller: follows the round and may stop it.
        console: where trainings show their progress.

    Raises:
        WaitingForPeople: reviewers are not done, and the config waits for them.
        BelowTheMark: the teacher does not reach the config's gate.
        LabelfleetError: a step failed; what was done before is recorded.
    """
    work = RoundWork.of(config, caller, address=address, console=console)
    chosen = selection or Selection()
    check_config(work)
    check_machine(work, chosen.steps())
    check_pool(work, chosen.steps())
    check_models(work, chosen.steps())
    new: list[StepName] = []
    with run_lock(work.store, f"labelfleet round {config.name}"), work.held:
        changed = False  # a repeated step may change what later ones are given
        for step in chosen.steps():
            asked: Repeat = "changed" if changed or step == "page" else "never"
            record = _take(work, step, "always" if step in chosen.again else asked)
            if record is not None:
                new.append(step)
                changed = changed or (step != "page" and record.attempt > 1)
    return summary_of(work, tuple(new))


def check_config(work: RoundWork) -> None:
    """Try every part of the config before anything is spent. Raises ConfigError."""
    config = work.config
    if config.fit.guarantee is not None and config.skips("pull"):
        raise ConfigError(
            f"fit.guarantee is proven from people's answers, and {config.skips('pull')}",
            hint="add a `review` section, or leave the guarantee out",
        )
    work.run_config("label", config.pool.model_dump(mode="json"), _STAND_IN)
    record = StepRecord("student", "begun", 1, {})
    for role in ("teacher", "student"):
        work.train_config(role, record, train=config.truth.model_dump())


def check_machine(work: RoundWork, steps: Sequence[StepName]) -> None:
    """Look before the first of ``steps`` whether this machine can do the trainings among them.

    Those of `workers` are on machines of their own, and a step may be left to another machine.

    Raises:
        ConfigError: a network does not fit into memory, or there is no such device.
    """
    given = work.config.teacher is not None or work.config.previous is not None
    roles: tuple[StepName, ...] = ("student",) if given else ("teacher", "student")
    record = StepRecord("student", "begun", 1, {})
    for role in roles:
        if not is_due(work, role, steps):
            continue
        training = work.train_config(role, record, train=work.config.truth.model_dump())
        if not training.workers.most:
            check_fits(training, resolve_machine(training).device)


def check_pool(work: RoundWork, steps: Sequence[StepName]) -> None:
    """Look before the first of ``steps`` whether there is a pool, if it is still to be labelled.

    Raises:
        SourceEmpty: there is nothing in it.
        ConfigError, StorageError: it cannot be listed, or the output lies in it.
    """
    if is_due(work, "label", steps):
        pool = work.run_config("label", work.config.pool.model_dump(mode="json"), _STAND_IN)
        check_places(pool)
        next(listed_objects(pool))


def _take(work: RoundWork, step: StepName, repeat: Repeat) -> StepRecord | None:
    """Take one step if it is due; return its record, or None where nothing was to be done."""
    old, reason = work.state.read(step), work.config.skips(step)
    if reason:
        work.state.skip(step, reason)
        return None
    inputs = _TABLE[step].inputs(work, StepRecord(step, "begun", 1, {}))
    record = work.state.begin(step, inputs, repeat)
    if record.over:
        return None
    fresh = old is None or old.attempt < record.attempt
    work.note(f"{step}: {'begins' if fresh else 'continues'}")
    if step in _WITH_RAY:
        work.hold_ray()
    else:
        work.held.close()  # a training wants the whole machine
    with _recorded(work, record) as finish:
        finish(_TABLE[step].take(work, record))
    return record


@contextmanager
def _recorded(work: RoundWork, record: StepRecord) -> Iterator[Callable[[Fields], None]]:
    """Write how the step ended, and how long it took, also where it failed."""
    began_s = time.monotonic()
    ended = record
    gpus = 1.0 if record.step in _ON_GPUS and has_gpu() else 0.0

    def finish(result: Fields) -> None:
        nonlocal ended
        ended = replace(record, status="done", result=result, reason="", gpus=gpus)

    try:
        yield finish
    except WaitingForPeople as exc:
        ended = replace(record, status="waiting", reason=exc.message)
        raise
    except LabelfleetError as exc:
        ended = replace(record, reason=exc.message)
        raise
    finally:
        seconds = record.seconds + time.monotonic() - began_s
        work.state.write(replace(ended, seconds=round(seconds, 3)))


def summary_of(work: RoundWork, new: tuple[StepName, ...] = ()) -> RoundSummary:
    """Read where a round stands."""
    records = {one.step: one for one in work.state.all()}
    left = tuple(s for s in STEPS if s not in records or not records[s].over)
    results = {step: one.result for step, one in records.items()}
    return RoundSummary(
        name=work.config.name,
        output=work.store.url,
        steps=tuple(records.values()),
        new=new,
        left=left,
        page=results.get("page", {}).get("page"),
        verdict=results.get("evaluate", {}).get("comparison", {}).get("sentence", ""),
        costs=costs_of(records.values()),
    )

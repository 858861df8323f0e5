"""The state of a round: one JSON record a step at the round's output, on any store.

    state/teacher.json   what the step was given, how it ended, what it left, how long it took
    state/gate.json      …

A step that was begun goes on at the same place; a step that is done is not repeated. One whose
inputs changed since is neither: it needs ``--again``, and then starts at a place of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

from storage.errors import ConfigError, ObjectNotFound
from storage.objects.json_records import digest_of, json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsPut

StepName = Literal[
    "teacher", "gate", "label", "fit", "route", "push", "pull", "decide", "student", "evaluate",
    "compile", "page",
]  # fmt: skip
STEPS: tuple[StepName, ...] = get_args(StepName)
Status = Literal["begun", "waiting", "done", "skipped"]
Repeat = Literal["never", "changed", "always"]
_FOLDER = "state/"
_SHOWN = 5


def refuse_unknown_steps(only: str | None, until: str | None, again: Sequence[str]) -> None:
    """Raise ConfigError where a command names a step that there is not, two ends, or a step to
    repeat that it leaves out."""
    names = [one for one in (only, until, *again) if one is not None]
    if unknown := [name for name in names if name not in STEPS]:
        raise ConfigError(f"a round has no step {unknown[0]!r}", hint=f"one of {', '.join(STEPS)}")
    if only is not None and until is not None:
        raise ConfigError("--only and --until contradict each other", hint="give one of them")
    left_out = [
        step
        for step in again
        if (only is not None and step != only)
        or (until is not None and STEPS.index(step) > STEPS.index(until))
    ]
    if left_out:
        end = f"--until {until}" if only is None else f"--only {only}"
        raise ConfigError(
            f"--again {left_out[0]} and {end} contradict each other: {end} leaves that step out",
            hint=f"`--only {left_out[0]} --again {left_out[0]}` repeats it alone",
        )


class StateStore(SupportsGet, SupportsPut, Protocol):
    """The store verbs that the state needs."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step.

    Attributes:
        status: ``waiting``: for people; the same command looks again.
        attempt: 1, and one more with every ``--again``.
        inputs: all that decides the result, as plain values; of a skipped step, those that it had
            been begun with, if it had.
        result: what it left.
        seconds: over all invocations that ended in an orderly way.
        gpus: that it used; 0: CPU alone.
        reason: why it was skipped, or what is waited for.
    """

    step: StepName
    status: Status
    attempt: int
    inputs: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    gpus: float = 0.0
    reason: str = ""

    @property
    def place(self) -> str:
        """The folder below the round's output that the step writes to."""
        return self.step if self.attempt == 1 else f"{self.step}-{self.attempt}"

    @property
    def over(self) -> bool:
        """Whether later steps may follow."""
        return self.status in ("done", "skipped")

    def to_fields(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def _record(fields: dict[str, Any]) -> StepRecord:
    if fields.pop("version") != 1:
        raise ValueError("written by a newer labelfleet")
    found = StepRecord(**fields)
    if found.step not in STEPS or found.status not in get_args(Status):
        raise ValueError(f"no step {found.step!r:.40} that is {found.status!r:.40}")
    return found


class RoundState:
    """The records of one round."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def read(self, step: StepName) -> StepRecord | None:
        """Return a step's record; None: it was never begun. Raises StorageError."""
        try:
            return read_record(self._store, f"{_FOLDER}{step}.json", _record)
        except ObjectNotFound:
            return None

    def write(self, record: StepRecord) -> None:
        """Replace a step's record."""
        body = json_record({"version": 1, **record.to_fields()})
        self._store.put(f"{_FOLDER}{record.step}.json", body)

    def result(self, step: StepName) -> dict[str, Any]:
        """Return what a finished step left. Raises ConfigError where it is not finished."""
        record = self.read(step)
        if record is None or not record.over:
            raise ConfigError(
                f"the step {step} of this round is not done yet",
                hint="`labelfleet round CONFIG` runs the steps in their order",
            )
        return record.result

    def all(self) -> list[StepRecord]:
        """Return the records that exist, in the order of the steps."""
        return [record for step in STEPS if (record := self.read(step)) is not None]

    def skip(self, step: StepName, reason: str) -> None:
        """Record that a step is left out; one that is done stays done, with what it left."""
        old = self.read(step)
        if old is None:
            self.write(StepRecord(step, "skipped", 1, {}, reason=reason))
        elif old.status != "done":  # its place may hold something: a later attempt must know
            self.write(replace(old, status="skipped", reason=reason))

    def begin(
        self, step: StepName, inputs: Mapping[str, Any], repeat: Repeat = "never"
    ) -> StepRecord:
        """Return the record to work under, written before the work starts.

        A finished step with the same inputs is returned as it is.

        Args:
            step: which.
            inputs: plain values that decide its result.
            repeat: when a step that is done, or was begun with other inputs, starts anew.

        Raises:
            ConfigError: its inputs changed, and ``repeat`` is ``never``.
        """
        given, old = dict(inputs), self.read(step)
        if old is None or (old.status == "skipped" and not old.inputs):
            attempt = 1 if old is None else old.attempt
        elif repeat == "always":
            attempt = old.attempt + 1
        elif digest_of(old.inputs) == digest_of(given):
            if old.status == "done":
                return old
            resumed = replace(old, status="begun", reason="")
            self.write(resumed)
            return resumed
        elif repeat == "changed" or old.status == "skipped":
            attempt = old.attempt + 1
        else:
            raise _changed(step, old, given)
        made = StepRecord(step, "begun", attempt, given)
        self.write(made)
        return made


def _changed(step: StepName, old: StepRecord, given: Mapping[str, Any]) -> ConfigError:
    keys = differing(old.inputs, given)
    shown = ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if keys[_SHOWN:] else "")
    was = "done" if old.status == "done" else "begun"
    return ConfigError(
        f"the step {step} was {was} with other inputs; these changed since: {shown}",
        hint=f"`--again {step}` repeats it and the later steps that depend on it; the earlier "
        "result stays where it is. Or undo the change, or choose another output",
    )


def differing(old: Mapping[str, Any], new: Mapping[str, Any], at: str = "") -> list[str]:
    """Return the dotted names of values that two nested mappings do not share."""
    found: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing(a, b, f"{at}{key}.")
        elif digest_of({"": a}) != digest_of({"": b}):
            found.append(f"{at}{key}")
    return found

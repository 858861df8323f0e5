"""Give a finished training more steps: ``labelfleet train CONFIG --extend STEPS``.

A finished training leaves its last state beside its summary. Extending it puts that state back,
with more steps, and sets the summary aside; from then on the output is that of a stopped training,
which any ``labelfleet train`` of the same config continues. Lost workers are started again with
the order of the command that started them, and an order is carried out once.
"""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.training.stages import STATE_NAME
from pipelines.training.summary import FILE_NAME, TrainSummary
from storage.errors import ConfigError
from workers.training.trainer import read_length, write_extended

LAST_STATE_NAME = "last_state.pt"
_ORDER_NAME = "extension.json"


@dataclass(frozen=True, slots=True)
class Extension:
    """An order to train longer.

    Attributes:
        steps: more than the training had.
        order: tells this command's order from that of another command.
    """

    steps: int
    order: str = field(default_factory=lambda: secrets.token_hex(8))


def keep_last_state(output: Path) -> None:
    """Keep the state of a training that is summed up, so that it can be extended."""
    state = output / STATE_NAME
    if state.exists():
        state.replace(output / LAST_STATE_NAME)


def extend(output: Path, finished: TrainSummary | None, more: Extension) -> bool:
    """Turn a finished training into a stopped one with more steps.

    An extension by as many steps that was stopped is left as it is: it only has to go on.

    Args:
        finished: its summary; None: it is not finished.

    Returns:
        Whether there is something to train; False: this very order was carried out.

    Raises:
        ConfigError: it is not finished, was extended by another number of steps, or left no state.
    """
    state = output / STATE_NAME
    if finished is None:
        _refuse_unfinished(output, more.steps)
        _note(output, more, read_length(state).total)
        return True
    # A summary of before the extension comes back from a store whose upload was cut off.
    if finished.steps >= _carried_out(output, more.order):
        return False
    # Killed between the summary and the renaming, a finished training still has its state.pt.
    for candidate in (state, output / LAST_STATE_NAME):
        if candidate.exists() and read_length(candidate).done == finished.steps:
            write_extended(candidate, state, finished.steps + more.steps)
            (output / FILE_NAME).replace(output / f"summary_{finished.steps}_steps.json")
            _note(output, more, finished.steps + more.steps)
            return True
    raise ConfigError(
        f"{output} has no state of step {finished.steps}, from which the training could go on",
        hint="it was deleted, or the training is of an older version; train with "
        f"`model.checkpoint: {finished.checkpoint}` and another output",
    )


def _note(output: Path, more: Extension, until: int) -> None:
    path = output / _ORDER_NAME
    partial = path.with_suffix(".partial")
    noted = {"order": more.order, "steps": more.steps, "until": until}
    partial.write_text(json.dumps(noted) + "\n")
    partial.replace(path)


def _carried_out(output: Path, order: str) -> float:
    """Return the step that this order led to, or leads to; infinity where it was not begun."""
    try:
        found = json.loads((output / _ORDER_NAME).read_text())
    except (OSError, ValueError):
        return math.inf
    if not isinstance(found, dict) or found.get("order") != order:
        return math.inf
    until = found.get("until", 0)
    return until if isinstance(until, int) else math.inf


def _refuse_unfinished(output: Path, steps: int) -> None:
    state = output / STATE_NAME
    if not state.exists():
        raise ConfigError(
            f"{output} holds no finished training", hint="run `labelfleet train` without --extend"
        )
    length = read_length(state)
    if length.extended_at and length.total - length.extended_at == steps:
        return
    if length.extended_at:
        raise ConfigError(
            f"{output} is being extended from step {length.extended_at} to step {length.total}, "
            f"and is at step {length.done}",
            hint="finish that first: `labelfleet train` without --extend",
        )
    raise ConfigError(
        f"the training in {output} is not finished: it is at step {length.done}",
        hint="run `labelfleet train` without --extend first",
    )

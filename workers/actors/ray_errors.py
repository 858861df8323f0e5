"""Ray's errors, told apart: a task's own error, a dead process, a node that went."""

from __future__ import annotations

from typing import Any

from ray import exceptions as ray_errors

from storage.errors import LabelfleetError, ShardFailed


def is_death(answer: Any) -> bool:
    """ "The actor is gone", in all the ways Ray says it; a task's own error is none."""
    return isinstance(answer, ray_errors.RayError) and not isinstance(
        answer, ray_errors.RayTaskError
    )


def own_error(exc: ray_errors.RayTaskError) -> LabelfleetError:
    cause = exc.cause
    if isinstance(cause, LabelfleetError):
        return cause
    return ShardFailed(f"{type(cause).__name__}: {cause}")


def first_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else 'no details'}"


def node_went(exc: Exception) -> bool:
    """Return whether the node died or was taken, rather than the process."""
    if isinstance(exc, ray_errors.NodeDiedError) or getattr(exc, "preempted", False):
        return True
    text = str(exc).lower()
    return "node was terminated" in text or "node died" in text or "its node has died" in text

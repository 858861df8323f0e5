"""Classify Ray's errors: a task's own error, a dead process, a lost node."""

from __future__ import annotations

from typing import Any

from ray import exceptions as ray_errors

from storage.errors import LabelfleetError, ShardFailed


def is_death(answer: Any) -> bool:
    """Return whether the actor is lost, by any of Ray's errors but a task's own."""
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
    """Return whether the node died or was reclaimed, rather than only the process."""
    if isinstance(exc, ray_errors.NodeDiedError) or getattr(exc, "preempted", False):
        return True
    text = str(exc).lower()
    return "node was terminated" in text or "node died" in text or "its node has died" in text

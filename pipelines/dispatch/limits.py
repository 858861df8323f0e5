"""Limits on the time and cost of an invocation, and how much of them is used."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that an invocation may take.

    Attributes:
        seconds: after which it stops, resumable; None: never.
        worker_seconds: the same, summed over its ready workers.
        start_after_s: without any ready worker, after which it ends with an error.
    """

    seconds: float | None = None
    worker_seconds: float | None = None
    start_after_s: float = 1800


class Spent:
    """Time and worker time since its creation, compared with the limits.

    Workers come and go, so their time is summed turn by turn.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._began_s = self._turned_s = clock()
        self._worker_seconds = 0.0

    def used_up(self, workers: int) -> bool:
        """Return whether a limit is reached; ``workers`` were ready since the last call."""
        now_s = self._clock()
        self._worker_seconds += workers * (now_s - self._turned_s)
        self._turned_s = now_s
        most_s, most_worker_s = self._limits.seconds, self._limits.worker_seconds
        return (most_s is not None and now_s - self._began_s > most_s) or (
            most_worker_s is not None and self._worker_seconds > most_worker_s
        )

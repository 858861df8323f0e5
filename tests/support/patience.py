"""How long a test waits: what it would on an idle machine, times how crowded this one is."""

from __future__ import annotations

import os

_AT_MOST = 8.0


def patient(seconds: float) -> float:
    """Stretch a time by the number of processes that want each core, at most eightfold."""
    crowd = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return seconds * min(max(1.0, crowd), _AT_MOST)

"""Waits that Ctrl-C always interrupts.

CPython checks for pending signals and then blocks on a lock. A signal that arrives between the two
stays pending until that wait ends, which may be never. Waits with a short timeout, repeated, see it
after half a second at the latest.
"""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Event
from typing import TypeVar

_T = TypeVar("_T")

_PIECE_S = 0.5


def wait_for(event: Event) -> None:
    """Return once ``event`` is set."""
    while not event.wait(_PIECE_S):
        pass


def result_of(future: Future[_T]) -> _T:
    """Return what ``future`` brings, or raise what it raises."""
    while True:
        try:
            return future.result(_PIECE_S)
        except FutureTimeout:
            if future.done():  # it may have raised one of its own
                return future.result()

"""Ctrl-C and SIGTERM as requests to stop: the first lets work in flight finish, the second not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopper:
    """Asked to stop: once, shards in flight may finish; twice, at once."""

    def __init__(self) -> None:
        self.requests = 0
        self.reason = "interrupted"

    def asked(self) -> bool:
        """Whether anybody asked."""
        return self.requests > 0

    def request(self, reason: str = "interrupted") -> None:
        """Ask (once more)."""
        self.requests += 1
        self.reason = reason


@contextmanager
def stopping_on_signals() -> Iterator[Stopper]:
    """A Stopper that SIGINT and SIGTERM ask; the handlers before are put back at the end.

    Outside the main thread, where Python allows no handlers, it is a Stopper nobody asks.
    """
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stopper.request("interrupted" if number == signal.SIGINT else "asked to terminate")
        if stopper.requests > 1:
            put_back()
            raise KeyboardInterrupt  # out of whatever blocks: a slow store, a wait

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopper
    finally:
        put_back()


def terminating_like_ctrl_c() -> None:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does: the same clean-up, the same exit code.

    Ray's own handler, which it installs when it connects, would exit at once.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)

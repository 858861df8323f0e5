"""Ctrl-C and SIGTERM become requests to stop: the first lets shards in flight finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipelines.drive import Stopper


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

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

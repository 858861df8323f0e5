"""Stop requests: the first lets shards in flight finish, the second ends the run at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopper:
    """A request to stop, made by any thread and read by the loop that drives the run.

    Attributes:
        requests: 0: go on; 1: finish the shards in flight; 2 and more: stop at once.
        reason: of the latest request, for people.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.reason = "interrupted"
        self._heeding = 0

    @property
    def heeded(self) -> bool:
        """Whether a loop is running that acts on a first request by itself."""
        return self._heeding > 0

    def asked(self) -> bool:
        """Return whether a stop was requested."""
        return self.requests > 0

    def request(self, reason: str = "interrupted") -> None:
        """Request a stop, or, the second time, an immediate one."""
        self.requests += 1
        self.reason = reason

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Mark the stretch of code that looks at ``requests`` often enough to be left to it."""
        self._heeding += 1
        try:
            yield
        finally:
            self._heeding -= 1


@contextmanager
def stopping_on_signals() -> Iterator[Stopper]:
    """Yield a Stopper that SIGINT and SIGTERM request; restore their handlers at the end.

    The first signal raises KeyboardInterrupt unless a loop heeds the Stopper at that moment: a
    listing or a start of Ray has no work in flight worth waiting for. The second one
    always raises it. Python allows no handlers outside the main thread: signals are not seen there.
    """
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stopper.request("interrupted" if number == signal.SIGINT else "asked to terminate")
        if stopper.requests > 1:
            put_back()
        if stopper.requests > 1 or not stopper.heeded:
            raise KeyboardInterrupt  # out of whatever blocks: a slow store, a wait

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopper
    finally:
        put_back()


@contextmanager
def keeping_signal_handlers() -> Iterator[None]:
    """Restore the caller's SIGINT and SIGTERM handlers after code that installs its own.

    Ray's SIGTERM handler, installed when it connects, would end the process without any clean-up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: installed by C code, which Python cannot restore
                signal.signal(number, handler)

"""Waiting that a Ctrl-C ends, also one that comes just before the wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import pytest

from storage.waiting import result_of, wait_for


@pytest.fixture(params=["event", "future"])
def endless(request: pytest.FixtureRequest) -> Callable[[], object]:
    """A wait that nothing but a signal ends."""
    if request.param == "event":
        return lambda: wait_for(threading.Event())
    return lambda: result_of(Future[None]())


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_an_interrupt_that_the_lock_does_not_see_ends_the_wait(
    endless: Callable[[], object],
) -> None:
    # A signal that another thread takes only marks that it came, as one does that comes between
    # the interpreter's last look and the lock: it does not wake the main thread.
    def take() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    threading.Timer(0.2, take).start()
    with pytest.raises(KeyboardInterrupt):
        endless()


def test_what_a_future_brings_is_passed_on() -> None:
    good: Future[int] = Future()
    threading.Timer(0.7, good.set_result, [3]).start()
    assert result_of(good) == 3

    bad: Future[int] = Future()
    bad.set_exception(FutureTimeout("its own"))
    with pytest.raises(FutureTimeout, match="its own"):
        result_of(bad)


def test_an_event_that_is_set_ends_the_wait() -> None:
    event = threading.Event()
    threading.Timer(0.7, event.set).start()
    wait_for(event)
    assert event.is_set()

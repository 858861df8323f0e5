"""Ctrl-C asks once, then acts."""

from __future__ import annotations

import signal
import threading

import pytest

from pipelines.dispatch.stopping import stopping_on_signals


def test_the_first_one_asks_and_the_second_one_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping_on_signals() as stopper:
        assert stopper.requests == 0
        signal.raise_signal(signal.SIGINT)
        assert stopper.requests == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handlers_are_put_back_when_nobody_asked() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stopping_on_signals() as stopper:
        assert stopper.requests == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_it_is_never_asked() -> None:
    seen: list[int] = []

    def use() -> None:
        with stopping_on_signals() as stopper:
            seen.append(stopper.requests)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [0]

"""Ctrl-C asks once, then acts."""

from __future__ import annotations

import signal
import threading

import pytest

from pipelines.stop_signal import stop_signal


def test_the_first_one_asks_and_the_second_one_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signal() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_handlers_are_put_back_when_nobody_asked() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_signal() as stop:
        assert not stop()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_it_is_never_asked() -> None:
    seen: list[bool] = []

    def use() -> None:
        with stop_signal() as stop:
            seen.append(stop())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]

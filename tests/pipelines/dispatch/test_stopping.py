"""Ctrl-C asks once, then acts; a caller's handlers survive a run."""

from __future__ import annotations

import signal
import threading

import pytest

from pipelines.dispatch.stopping import Stopper, keeping_signal_handlers, stopping_on_signals

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_one_asks_a_loop_that_heeds_it_and_the_second_one_interrupts(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with stopping_on_signals() as stopper:
        assert stopper.requests == 0
        with stopper.heeding():
            signal.raise_signal(number)
            assert stopper.requests == 1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", BOTH)
def test_while_no_loop_heeds_it_the_first_one_interrupts(number: signal.Signals) -> None:
    with stopping_on_signals() as stopper:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert stopper.requests == 1


def test_the_handlers_are_put_back_without_a_signal() -> None:
    before = [signal.getsignal(s) for s in BOTH]
    with stopping_on_signals() as stopper:
        assert stopper.requests == 0
    assert [signal.getsignal(s) for s in BOTH] == before


def test_outside_the_main_thread_it_sees_no_signal() -> None:
    seen: list[int] = []

    def use() -> None:
        with stopping_on_signals() as stopper, keeping_signal_handlers():
            seen.append(stopper.requests)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [0]


def test_any_thread_may_request_a_stop() -> None:
    stopper = Stopper()
    thread = threading.Thread(target=stopper.request, args=("the button was pressed",))
    thread.start()
    thread.join()
    assert stopper.asked()
    assert stopper.reason == "the button was pressed"


def test_handlers_that_a_library_installs_do_not_stay() -> None:
    before = [signal.getsignal(s) for s in BOTH]
    with keeping_signal_handlers():
        for number in BOTH:
            signal.signal(number, lambda number, frame: None)
    assert [signal.getsignal(s) for s in BOTH] == before

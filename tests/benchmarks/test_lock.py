"""benchmarks.lock: where the interpreter's flag lies, and what a worker says of itself."""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import pytest

from benchmarks.lock import Child, flag_at

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_flag_says_that_this_thread_has_the_lock() -> None:
    assert ctypes.c_int.from_address(flag_at()).value == 1  # reading it so does not release it


@pytest.mark.slow
def test_a_worker_says_what_it_holds_the_lock_for() -> None:
    child = Child("held", ROOT, argparse.Namespace(images=8, photos=None))
    try:
        assert 0 < child.measure() < 1000
    finally:
        child.close()

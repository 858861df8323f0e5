"""obstore's threads, and ours: where it can be called, and how without losing Ctrl-C.

Its threads start with the first call and do not survive a fork; a call in the child would wait for
them for ever, without an error (``multiprocessing`` forks by default on Linux, and so do the
workers of a PyTorch DataLoader). While it waits for a server, it does not look for signals.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from storage.waiting import result_of

_T = TypeVar("_T")
_first_used_in = 0


def obstore_works_here() -> bool:
    """Return whether obstore's threads are, or will be, in this process; call it before each use
    that could be the first."""
    global _first_used_in  # as obstore's threads: one set a process
    _first_used_in = _first_used_in or os.getpid()
    return _first_used_in == os.getpid()


def in_main_thread() -> bool:
    """Return whether this is the thread that runs signal handlers."""
    return threading.current_thread() is threading.main_thread()


def interruptible(call: Callable[[], _T]) -> _T:
    """Return what ``call`` returns, or raise what it raises; in the main thread it runs in another
    one, so that a signal is handled while it waits. After an interrupt it goes on there, unheard.
    """
    if not in_main_thread():
        return call()
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as exc:  # noqa: BLE001  # raised where the result is asked for
            done.set_exception(exc)

    threading.Thread(target=run, name="obstore", daemon=True).start()
    return result_of(done)

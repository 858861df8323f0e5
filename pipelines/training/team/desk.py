"""Where the driver and the workers of a training leave word for each other; no Ray in here.

The leading worker posts what it prints, any worker posts where it runs and the error that ends the
training; the driver leaves an order, which the leading worker acts on after a step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.dispatch.stopping import Stopper
from storage.errors import LabelfleetError

Order = Literal["", "stop", "move"]
_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Placed:
    """A worker runs on this node."""

    node_id: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that a restart would meet again."""

    error: LabelfleetError


Word = str | Placed | Failed


class Desk:
    """The words and the order, in order of arrival; an actor of the driver's."""

    def __init__(self) -> None:
        self._words: list[Word] = []
        self._order: Order = ""

    def post(self, words: Sequence[Word]) -> Order:
        """Leave words; return the driver's order."""
        self._words += words
        return self._order

    def take(self) -> list[Word]:
        """Return the words since the last call."""
        words, self._words = self._words, []
        return words

    def give(self, order: Order) -> None:
        """Leave an order; '' takes the last one back."""
        self._order = order


Posts = Callable[[Sequence[Word]], Order]  # ``Desk.post``, wherever the desk is


class Correspondent:
    """The leading worker's side: a text stream whose words a thread posts.

    Args:
        post: raises when the desk is gone.
        stopper: told of the driver's orders.
        orphaned: called when the desk is gone: without a driver this process has to end, or it
            would write over the work of the next one.
    """

    def __init__(
        self, post: Posts, stopper: Stopper, orphaned: Callable[[], Any], every_s: float = _EVERY_S
    ) -> None:
        self._post, self._stopper, self._orphaned = post, stopper, orphaned
        self._every_s = every_s
        self._waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="desk")
        self._thread.start()

    def write(self, text: str) -> int:
        """Post a piece of text."""
        self._waiting.put(text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread posts twice a second."""

    def close(self) -> None:
        """Post what is waiting, and end the thread."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            last = self._closed.wait(self._every_s)
            text = "".join(self._waiting.get() for _ in range(self._waiting.qsize()))
            try:
                order = self._post([text] if text else [])
            except Exception:  # noqa: BLE001 - a thread's border, and Ray's: the driver is gone
                self._orphaned()
                return
            if order and not self._stopper.asked():
                self._stopper.request(order)
            if last and self._waiting.empty():
                return

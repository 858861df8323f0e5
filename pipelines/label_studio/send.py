"""Create each task once, on a server that has no unique keys and may lose replies.

A chunk is imported in one transaction: it is there whole, or not at all, or not yet. After a lost
reply its keys are looked up until the server has settled; only what is still missing is sent again.
Should the first import land after all, two tasks carry one key: of untouched twins
all but the oldest are deleted. Pull looks for twins again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.label_studio.client import KEY, SupportsTasks, TaskRef
from pipelines.label_studio.errors import OutcomeUnknown, RequestTooLarge, ReviewUnavailable

log = logging.getLogger("labelfleet.review")


@dataclass(frozen=True, slots=True)
class SendRules:
    """Rules for sending tasks.

    Attributes:
        first, most: tasks a request, to begin with and at most.
        target_s: seconds a request should take; the size follows the server's pace.
        settle_s: how long after a lost reply a chunk may still turn up, at least; three times the
            slowest request so far if that is longer.
        tries: lost replies in a row after which we give up; push again to continue.
    """

    first: int = 250
    most: int = 1000
    target_s: float = 4.0
    settle_s: float = 5.0
    tries: int = 6


@dataclass(slots=True)
class Sender:
    """Imports tasks into one project, each key once.

    Args:
        server: see ``SupportsTasks``; nothing it offers repeats an import by itself.
        on_sent: called with the number of tasks that are there now.

    Attributes:
        created: tasks that were sent.
        doubted: keys whose import had no reply. That they are there was looked up; that they are
            there with their predictions was not.
    """

    server: SupportsTasks
    project_id: int
    rules: SendRules = SendRules()
    on_sent: Callable[[int], None] = lambda _count: None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    created: int = 0
    lost_replies: int = 0
    twins_deleted: int = 0
    doubted: set[str] = field(default_factory=set)
    _size: int = 0
    _slowest_s: float = 0.0
    _doubtful: set[str] = field(default_factory=set)

    def send(self, tasks: Iterable[dict[str, Any]]) -> int:
        """Create the tasks, whose ``data`` all carry a key; returns how many.

        Raises:
            ReviewUnavailable: the server kept failing; what is there stays, and sending what is
                missing continues.
        """
        self._size, sent = self.rules.first, 0
        waiting: list[dict[str, Any]] = []
        for task in tasks:
            waiting.append(task)
            if len(waiting) >= self._size:
                sent += self._send_all(waiting)
                waiting = []
        sent += self._send_all(waiting)
        self._delete_twins()
        self.created += sent
        return sent

    def _send_all(self, waiting: Sequence[dict[str, Any]]) -> int:
        """Send in chunks of the present size, which may shrink on the way."""
        at = 0
        while at < len(waiting):
            chunk = waiting[at : at + self._size]
            try:
                self._send_once(chunk)
            except RequestTooLarge:
                if len(chunk) == 1:
                    raise
                self._size = max(1, len(chunk) // 2)
                continue
            at += len(chunk)
            self.on_sent(len(chunk))
        return len(waiting)

    def _send_once(self, chunk: Sequence[dict[str, Any]]) -> None:
        """Until every key of the chunk is there, and sent by us no more often than needed."""
        missing, lost = list(chunk), 0
        while missing:
            began_s = self.clock()
            try:
                self.server.import_tasks(self.project_id, missing)
            except OutcomeUnknown as exc:
                self.lost_replies += 1
                lost += 1
                self.doubted |= {_key(task) for task in missing}
                log.warning("%s; looking which of %d tasks are there", exc.message, len(missing))
                if lost >= self.rules.tries:
                    raise ReviewUnavailable(
                        f"Label Studio failed {lost} times in a row: {exc.message}",
                        hint="check its log, then push again: existing tasks are not sent twice",
                    ) from exc
                self._size = max(1, self._size // 2)
                before, missing = missing, self._missing_once_settled(missing)
                if missing:
                    self._doubtful |= {_key(task) for task in before}
            else:
                self._pace(len(missing), self.clock() - began_s)
                return

    def _missing_once_settled(self, tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of the tasks that did not turn up within the time the server may need."""
        until_s = self.clock() + max(self.rules.settle_s, 3 * self._slowest_s)
        wait_s = 0.25
        while True:
            found = self.server.task_refs(self.project_id, [_key(task) for task in tasks])
            there = {ref.key for ref in found}
            missing = [task for task in tasks if _key(task) not in there]
            if not missing or self.clock() >= until_s:
                return missing
            self.sleep(wait_s)
            wait_s = min(2 * wait_s, 5.0)

    def _pace(self, tasks: int, seconds: float) -> None:
        """The next chunk's size, from how fast this one went."""
        self._slowest_s = max(self._slowest_s, seconds)
        fitting = int(tasks * self.rules.target_s / max(seconds, 1e-3))
        self._size = max(1, min(fitting, 2 * self._size, self.rules.most))

    def _delete_twins(self) -> None:
        """Of the keys that were sent more than once; whatever is late has landed by now."""
        if self._doubtful:
            refs = self.server.task_refs(self.project_id, sorted(self._doubtful))
            self.twins_deleted += delete_twins(self.server, list(refs))
            self._doubtful.clear()


def delete_twins(server: SupportsTasks, refs: Iterable[TaskRef]) -> int:
    """Delete untouched tasks that share their key with another task.

    Returns:
        How many. Of twins that were all touched, all stay: every answer counts.
    """
    deleted = 0
    for task_id in untouched_twins(refs):
        if not server.is_touched(task_id):  # it may have been opened since it was listed
            server.delete_task(task_id)
            deleted += 1
    return deleted


def untouched_twins(refs: Iterable[TaskRef]) -> list[int]:
    """Return the ids of tasks to delete: untouched twins, but for the oldest if none is touched."""
    by_key: dict[str, dict[int, TaskRef]] = defaultdict(dict)
    for ref in refs:
        by_key[ref.key][ref.task_id] = ref
    doomed = []
    for twins in by_key.values():
        kept = {i for i, ref in twins.items() if ref.touched} or {min(twins)}
        doomed += sorted(twins.keys() - kept)
    return doomed


def _key(task: dict[str, Any]) -> str:
    return str(task["data"][KEY])

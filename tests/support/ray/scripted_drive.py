"""A run driven over a pool that answers from a script: no Ray process, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import pytest

from pipelines.dispatch.dispatcher import Dispatcher, DispatchRules
from pipelines.dispatch.drive import Drive, Journal, Outcome, Terms
from pipelines.dispatch.limits import Limits
from pipelines.dispatch.stopping import Stopper
from pipelines.dispatch.tally import Caller, Tally
from storage.errors import (
    LabelfleetError,
)
from storage.objects.protocols import ObjectStore
from storage.records import Shard
from storage.runs.annotations import ShardFooter
from storage.runs.ledger import LedgerEntry, LedgerWriter, read_ledger
from storage.runs.manifest import Commit, Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import record, tar_shard
from workers.actors.actor import WorkerFacts
from workers.actors.events import (
    Event,
    ShardDone,
    ShardError,
    WorkerGone,
    WorkerReady,
)

Answer = Callable[[str, Shard, str], Event | None]


def done(worker: str, shard: Shard, attempt: str) -> Event:
    footer = ShardFooter(
        shard_id=shard.shard_id,
        shard_key=shard.key,
        attempt=attempt,
        counts={"ok": 3, "undecodable": 1},
        detections=7,
        source_truncated=None,
        seconds={"infer": 0.5},
    )
    return ShardDone(worker, shard.shard_id, Commit(shard.shard_id, True, footer))


def failing(error: LabelfleetError, *keys: str) -> Answer:
    """Fail every attempt at these shards (at all shards if none is named); label the others."""

    def answer(worker: str, shard: Shard, attempt: str) -> Event:
        if not keys or shard.key in keys:
            return ShardError(worker, shard.shard_id, error)
        return done(worker, shard, attempt)

    return answer


class ScriptedPool:
    """Answers each submitted shard at the next turn, one event a turn, as ``answer`` says."""

    def __init__(self, answer: Answer = done, first: Sequence[Event] = ()) -> None:
        self.answer = answer
        self.alive = 0
        self.submitted: list[tuple[str, str]] = []
        self.attempts: list[str] = []
        self.replaced: list[str] = []
        self.turns = 0
        self.each_turn: Callable[[int], None] = lambda turn: None
        self._queue: deque[Event] = deque(first or [ready("w0"), ready("w1")])

    def submit(self, worker: str, shard: Shard, attempt: str) -> None:
        self.submitted.append((worker, shard.key))
        self.attempts.append(attempt)
        event = self.answer(worker, shard, attempt)
        if event is not None:
            self._queue.append(event)

    def events(self, timeout_s: float) -> list[Event]:
        self.turns += 1
        assert self.turns < 10_000, "the loop does not end"
        self.each_turn(self.turns)
        if not self._queue:
            return []
        event = self._queue.popleft()
        self.alive += {WorkerReady: 1, WorkerGone: -1}.get(type(event), 0)
        return [event]

    def replace(self, worker: str, reason: str) -> None:
        self.replaced.append(worker)
        self._queue = deque(e for e in self._queue if getattr(e, "worker", "") != worker)
        self._queue.append(WorkerGone(worker, reason, blameless=True))
        self._queue.append(ready(f"{worker}+"))

    def say(self, *events: Event) -> None:
        self._queue.extend(events)


class Notes:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def update(self, tally: Tally) -> None:
        pass

    def note(self, text: str) -> None:
        self.said.append(text)


class Cluster:
    """A cluster that remembers what the loop asked and told it."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.left: list[tuple[str, str, float | None]] = []

    def follow(self, ended: int) -> None:
        self.ended.append(ended)

    def leaving(self, worker: str, reason: str, within_s: float | None) -> None:
        self.left.append((worker, reason, within_s))


def ready(worker: str) -> WorkerReady:
    return WorkerReady(worker, WorkerFacts("here", 1, "cpu", 8))


class Bench:
    """A run of that many tars, driven over a scripted pool."""

    def __init__(
        self,
        shards: int,
        pool: ScriptedPool,
        *,
        store: ObjectStore | None = None,
        limits: Limits | None = None,
        guard: Callable[[], None] = lambda: None,
        cluster: Cluster | None = None,
        wall: Callable[[], float] = lambda: 1.7e9,
        depth: int = 3,
        ledger_lines: int = 1000,
    ) -> None:
        self.store = store or MemoryStore()
        self.pool, self.notes, self.stopper = pool, Notes(), Stopper()
        self.manifest = Manifest.create_or_continue(self.store, record())
        self.ledger = LedgerWriter(self.store, "now", max_lines=ledger_lines)
        self.shards = [tar_shard(f"{index:03d}.tar") for index in range(shards)]
        self.dispatcher = Dispatcher(iter(self.shards), DispatchRules(attempts=3, depth=depth))
        self.drive = Drive(
            Journal(self.manifest, self.ledger, "now", wall),
            self.dispatcher,
            pool,
            Caller(self.notes, self.stopper),
            terms=Terms(limits or Limits(), guard),
            cluster=cluster,
        )

    def run(self) -> Outcome:
        return self.drive.run(len(self.shards))

    def fails(self, kind: type[LabelfleetError]) -> LabelfleetError:
        with pytest.raises(kind) as caught:
            self.run()
        return caught.value

    def entries(self, event: str) -> list[LedgerEntry]:
        self.ledger.flush()
        return [e for e in read_ledger(self.store, "now") if e.event == event]

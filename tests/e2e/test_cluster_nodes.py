"""Nodes that join, drain, get a spot notice and die under a run: a real Ray, declared GPUs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipelines.cluster.elastic import Elastic
from pipelines.cluster.nodes import NodeWatch, alive_nodes, announce_leaving
from pipelines.cluster.sizing import Sizing, wanted_actors
from pipelines.config.run_config import WorkersConfig
from pipelines.dispatch.dispatcher import Dispatcher
from pipelines.dispatch.drive import Drive, Journal
from pipelines.dispatch.tally import Caller, Tally
from pipelines.labelling.open_run import open_run
from pipelines.labelling.work import Work, find_work
from storage.runs.ledger import LedgerWriter, read_ledger
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from tests.support.patience import patient
from tests.support.ray.bright_actor import bright_actor
from tests.support.samples.tiny_run import fill_folder, run_config
from tests.support.servers.metadata import metadata_server
from workers.actors.pool import LabelPool, PoolSize
from workers.spec import LabellerOptions, WorkerSpec

pytestmark = pytest.mark.slow

GPU = 0.5  # an actor; so two share one
IMAGES = 200
_LIMIT_S = 240
# A dead node is otherwise noticed after 14 s.
QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 2,
}


class Nodes:
    """A Ray cluster on this machine: a head without GPUs, and the nodes that tests add."""

    def __init__(self) -> None:
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": QUICK}
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "num_gpus": 0})
        ray.init(address=self.cluster.address, log_to_driver=False)
        self._added: list[Any] = []

    def add(self, gpus: int) -> str:
        """Add a node; returns its id."""
        node = self.cluster.add_node(num_cpus=2, num_gpus=gpus)
        self._added.append(node)
        return str(node.node_id)

    def kill(self, node_id: str) -> None:
        """SIGKILL all of a node's processes."""
        (node,) = (n for n in self._added if n.node_id == node_id)
        self._added.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def clear(self) -> None:
        """Only the head stays."""
        for node in list(self._added):
            self.kill(node.node_id)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with closing(Nodes()) as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: Nodes) -> Iterator[Nodes]:
    yield cluster
    cluster.clear()


class Run:
    """A run of ``IMAGES`` images, one a shard, driven in this process over the real pool."""

    def __init__(self, folder: Path, checkpoint: Path, images: int = IMAGES) -> None:
        fill_folder(folder / "in", images, size=16)
        config = run_config(folder / "in", folder / "out", checkpoint, source={"shard_size": 1})
        run = open_run(config, cuda=False)
        self.manifest: Manifest = run.manifest
        self.images = images
        self.work: Work = find_work(run, config, None)
        self.spec = WorkerSpec(
            run.model, run.source.url, run.manifest.url, options=LabellerOptions(1, 1)
        )
        self.notes: list[str] = []
        self.each_turn: Callable[[Tally], None] = lambda tally: None
        self.pool: LabelPool | None = None

    def update(self, tally: Tally) -> None:
        self.each_turn(tally)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def workers(
        self, count: int, pause_s: float, pause_while: Path | None = None
    ) -> Iterator[LabelPool]:
        actor = bright_actor(pause_s, pause_while=pause_while)
        size = PoolSize(count, GPU, 0.25)
        self.pool = LabelPool(self.spec, size, depth=2, hang_after_s=120, actor=actor)
        self.pool.start()
        try:
            yield self.pool
        finally:
            self.pool.close()

    def drive(self, pool: LabelPool, count: int) -> Tally:
        """To the end, following the cluster as a run with ``count: auto`` does."""
        ledger = LedgerWriter(self.manifest.store, "now")
        sizing = Sizing(count, GPU, 0.25, 1, 1, 1)

        def wanted(nodes: Any) -> int:
            return wanted_actors(WorkersConfig(), sizing, nodes)

        watch = NodeWatch(every_s=0.3)
        with closing(watch):
            follow = Elastic(pool, watch, wanted, self.work.total, announce=announce_leaving)
            loop = Drive(
                Journal(self.manifest, ledger, "now"),
                Dispatcher(self.work.shards),
                pool,
                Caller(self),
                cluster=follow,
            )
            assert loop.run() == "done"
        ledger.flush()
        return loop.tally

    def check(self, tally: Tally) -> None:
        """Every image once, nothing set aside."""
        found = Counter(row.image_id for row in live_rows(self.manifest))
        assert len(found) == self.images
        assert set(found.values()) == {1}
        assert (tally.shards, tally.quarantined) == (self.images, 0)

    def done_by(self) -> Counter[str]:
        """Shards by worker."""
        return Counter(
            e.note["worker"] for e in read_ledger(self.manifest.store, "now") if e.event == "shard"
        )


def wait_for(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + patient(_LIMIT_S)
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_two_actors_share_a_gpu_and_none_has_parts_of_two(
    nodes: Nodes, nano_checkpoint: Path, tmp_path: Path
) -> None:
    nodes.add(gpus=2)
    run = Run(tmp_path, nano_checkpoint, images=8)
    with run.workers(4, pause_s=0) as pool:
        facts = []
        limit = time.monotonic() + patient(_LIMIT_S)
        while len(facts) < 4:
            assert time.monotonic() < limit
            facts += [event.facts for event in pool.events(0.2)]
        assert Counter(fact.device for fact in facts) == {"0": 2, "1": 2}
        assert len({fact.pid for fact in facts}) == 4


def test_a_node_that_joins_is_used_and_one_that_dies_loses_nothing(
    nodes: Nodes, nano_checkpoint: Path, tmp_path: Path
) -> None:
    first = nodes.add(gpus=1)
    run = Run(tmp_path, nano_checkpoint)
    added: list[str] = []
    on_it: set[str] = set()
    killed: list[str] = []
    waiting = tmp_path / "waiting"  # the new node's workers take their time to load
    waiting.touch()

    def each_turn(tally: Tally) -> None:
        assert run.pool is not None
        places = run.pool.places()
        if tally.shards >= 10 and not added:
            added.append(nodes.add(gpus=1))
        on_it.update(worker for worker, node_id in places.items() if [node_id] == added)
        if len(on_it) == 2 and not killed:
            killed.append(first)
            nodes.kill(first)  # with all that its two workers hold
            waiting.unlink()

    run.each_turn = each_turn
    with run.workers(2, pause_s=0.5, pause_while=waiting) as pool:
        tally = run.drive(pool, 2)
    run.check(tally)
    assert killed
    assert all(run.done_by()[worker] > 0 for worker in on_it)
    assert tally.requeued > 0
    assert sum(note.startswith("lost ") for note in run.notes) == 2


def test_a_node_that_drains_is_emptied_and_gets_nothing_more(
    nodes: Nodes, nano_checkpoint: Path, tmp_path: Path
) -> None:
    going, staying = nodes.add(gpus=1), nodes.add(gpus=1)
    run = Run(tmp_path, nano_checkpoint)
    drained: dict[str, int] = {}
    seen_on: set[str] = set()
    waiting = tmp_path / "waiting"  # until the node is empty
    waiting.touch()

    def each_turn(tally: Tally) -> None:
        assert run.pool is not None
        places = run.pool.places()
        if len(places) == 4 and not drained and tally.shards >= 10:
            announce_leaving(going, "its owner wants it back", 60)
            drained.update({w: tally.shards for w, node_id in places.items() if node_id == going})
            assert {n.node_id for n in alive_nodes() if n.leaving} == {going}
        elif drained:
            if not drained.keys() & places.keys():
                waiting.unlink(missing_ok=True)
            seen_on.update(places[worker] for worker in places if worker not in drained)

    run.each_turn = each_turn
    with run.workers(4, pause_s=0.5, pause_while=waiting) as pool:
        tally = run.drive(pool, 4)
    run.check(tally)
    assert len(drained) == 2
    assert sum("its node drains" in note and "no more shards" in note for note in run.notes) == 2
    emptied = [note for note in run.notes if note.startswith("lost ")]
    assert len(emptied) == 2
    assert not any("requeued" in note for note in emptied), "what they had was not finished"
    assert tally.requeued == 0
    assert seen_on == {staying}, "a worker was put on a node that drains"


def test_a_spot_notice_empties_the_node_and_ray_is_told(
    nodes: Nodes, nano_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.add(gpus=1)
    with metadata_server() as metadata:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)  # as S3's tests set it
        spot = nodes.add(gpus=1)
        monkeypatch.delenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
        run = Run(tmp_path, nano_checkpoint, images=480)
        told: list[set[str]] = []
        waiting = tmp_path / "waiting"  # a notice takes up to ten seconds to be seen
        waiting.touch()

        def each_turn(tally: Tally) -> None:
            assert run.pool is not None
            if list(run.pool.places().values()).count(spot) == 2 and tally.shards >= 10:
                metadata.notice = '{"action": "terminate", "time": "2099-01-01T00:00:00Z"}'
            if any("spot notice" in note for note in run.notes) and not told:
                told.append({node.node_id for node in alive_nodes() if node.leaving})
                waiting.unlink()

        run.each_turn = each_turn
        with run.workers(4, pause_s=1, pause_while=waiting) as pool:
            tally = run.drive(pool, 4)
    run.check(tally)
    assert told == [{spot}]
    assert tally.requeued == 0
    assert sum("no more shards" in note for note in run.notes) == 2

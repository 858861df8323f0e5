"""Elastic: what a look at the cluster means for the pool. No Ray, no clock."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipelines.cluster.elastic import Elastic
from pipelines.cluster.nodes import ClusterNode, NodeWatch
from pipelines.cluster.sizing import Node, size_pool, wanted_actors
from pipelines.config.run_config import WorkersConfig
from pipelines.dispatch.limits import Limits, Spent
from storage.errors import RayLost


class Pool:
    """Remembers what it was told."""

    def __init__(self, **places: str) -> None:
        self.where = places
        self.sizes: list[int] = []
        self.drained: list[tuple[str, str, float | None]] = []
        self.replaced: list[str] = []

    def places(self) -> dict[str, str]:
        return dict(self.where)

    def resize(self, count: int) -> None:
        self.sizes.append(count)

    def drain(self, worker: str, reason: str, within_s: float | None) -> None:
        self.drained.append((worker, reason, within_s))

    def replace(self, worker: str, reason: str) -> None:
        self.replaced.append(worker)
        del self.where[worker]


class Watch:
    """Shows what it is told to."""

    def __init__(self) -> None:
        self.nodes: list[ClusterNode] | None = None
        self.silent = 0.0

    def show(self, *nodes: ClusterNode) -> None:
        self.nodes = list(nodes)

    def silent_s(self) -> float:
        return self.silent


def gpu_node(node_id: str, gpus: float = 2.0, **leaving: object) -> ClusterNode:
    return ClusterNode(node_id, Node(8.0, gpus), **leaving)  # type: ignore[arg-type]  # by name


def gpus(nodes: Sequence[Node]) -> int:
    return int(sum(node.gpus for node in nodes))


HOME = ClusterNode("home", Node(4.0, 0.0))


class Bench:
    def __init__(self, pool: Pool, shards: int = 100) -> None:
        self.pool, self.watch = pool, Watch()
        self.announced: list[tuple[str, str, float | None]] = []
        self.elastic = Elastic(
            pool, self.watch, gpus, shards,
            announce=lambda node_id, reason, s: self.announced.append((node_id, reason, s)),
            home="home",
        )  # fmt: skip

    def look(self, *nodes: ClusterNode, ended: int = 0) -> None:
        self.watch.show(*nodes, HOME)
        self.elastic.follow(ended)


def test_nodes_that_join_are_used_up_to_the_shards_that_are_left() -> None:
    bench = Bench(Pool(), shards=10)
    bench.look(gpu_node("a"))
    bench.look(gpu_node("a"), gpu_node("b"))
    bench.look(gpu_node("a"), gpu_node("b"), ended=7)
    bench.look(gpu_node("a"), gpu_node("b"), ended=10)
    assert bench.pool.sizes == [2, 4, 3, 1]


def test_nothing_is_done_before_the_first_look_or_without_a_new_one() -> None:
    bench = Bench(Pool())
    bench.elastic.follow(0)
    bench.look(gpu_node("a"))
    bench.elastic.follow(0)
    assert bench.pool.sizes == [2]


def test_a_node_that_drains_is_emptied_and_no_longer_counted() -> None:
    bench = Bench(Pool(w0="a", w1="b", w2="b"))
    bench.look(gpu_node("a"), gpu_node("b", leaving=True, within_s=90.0))
    assert [(worker, within_s) for worker, _, within_s in bench.pool.drained] == [
        ("w1", 90.0),
        ("w2", 90.0),
    ]
    assert bench.pool.sizes == [2]


def test_a_node_that_two_looks_do_not_show_is_gone() -> None:
    bench = Bench(Pool(w0="a", w1="b"))
    bench.look(gpu_node("a"), gpu_node("b"))
    bench.look(gpu_node("a"))
    assert bench.pool.replaced == []  # it may have joined after the look
    bench.look(gpu_node("a"))
    assert bench.pool.replaced == ["w1"]
    bench.look(gpu_node("a"))
    assert bench.pool.replaced == ["w1"]


def test_a_notice_is_passed_on_once_for_all_workers_of_the_node() -> None:
    bench = Bench(Pool(w0="a", w1="b", w2="b", w3="c"))
    bench.look(gpu_node("a"), gpu_node("b"), gpu_node("c", leaving=True))
    bench.elastic.leaving("w1", "spot notice (terminate)", 110.0)
    bench.elastic.leaving("w2", "spot notice (terminate)", 108.0)
    bench.elastic.leaving("w3", "its node drains", None)  # Ray said so itself
    bench.elastic.leaving("w9", "spot notice (terminate)", 1.0)  # gone already
    assert bench.announced == [("b", "spot notice (terminate)", 110.0)]


def test_a_head_that_does_not_answer_ends_the_run_with_words() -> None:
    bench = Bench(Pool())
    bench.watch.silent = 29.0
    bench.elastic.follow(0)
    bench.watch.silent = 31.0
    with pytest.raises(RayLost, match="head has not answered") as caught:
        bench.elastic.follow(0)
    assert caught.value.hint


def test_ray_that_died_on_this_machine_ends_the_run_with_words() -> None:
    bench = Bench(Pool())
    bench.look()
    bench.watch.show()  # it was the only node
    bench.elastic.follow(0)  # one look may be too early
    bench.watch.show()
    with pytest.raises(RayLost, match="raylet"):
        bench.elastic.follow(0)


def test_auto_grows_with_the_cluster_and_never_shrinks_below_its_start() -> None:
    config, two = WorkersConfig(), [Node(8, 2), Node(8, 2)]
    sizing = size_pool(config, two, cuda=True)
    assert wanted_actors(config, sizing, two) == 4
    assert wanted_actors(config, sizing, [*two, Node(16, 4)]) == 8
    assert wanted_actors(config, sizing, []) == 4
    assert wanted_actors(WorkersConfig(count=3), sizing, [*two, Node(16, 4)]) == 3


def test_a_fraction_of_a_gpu_counts_the_actors_that_fit_a_joining_node() -> None:
    config = WorkersConfig(gpus=0.5, cpus=1)
    sizing = size_pool(config, [Node(8, 1)], cuda=True)
    assert sizing.count == 2
    assert wanted_actors(config, sizing, [Node(8, 1), Node(3, 2)]) == 5


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_silent_head_is_told_from_a_driver_that_stood_still() -> None:
    clock, said = Clock(), [True]

    def look() -> list[ClusterNode]:
        if not said[0]:
            raise RuntimeError("no answer")
        return []

    watch = NodeWatch(look, every_s=0.001, clock=clock)
    while watch.nodes is None:
        pass
    said[0] = False
    for _ in range(30):
        clock.now_s += 1
        silent_s = watch.silent_s()
    assert 28 <= silent_s <= 30
    clock.now_s += 3600  # suspended
    assert watch.silent_s() == 0
    watch.close()


def test_money_is_spent_by_the_workers_that_are_there() -> None:
    clock = Clock()
    spent = Spent(Limits(worker_seconds=100), clock)
    clock.now_s += 10
    assert not spent.used_up(4)  # 40
    clock.now_s += 10
    assert not spent.used_up(0)
    clock.now_s += 5
    assert not spent.used_up(12)  # 100: the pool has grown
    clock.now_s += 1
    assert spent.used_up(1)

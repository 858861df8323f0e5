"""Sizing: what the cluster has is used, never more than that, and nothing is ever zero."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cluster.sizing import Node, Sizing, size_pool, wants_gpu
from pipelines.config.run_config import WorkersConfig
from storage.errors import ConfigError

cores = st.integers(1, 256)
cpu_nodes = st.lists(st.builds(Node, cores.map(float), st.just(0.0)), min_size=1, max_size=8)
gpu_nodes = st.lists(
    st.builds(Node, cores.map(float), st.integers(1, 8).map(float)), min_size=1, max_size=8
)


def size(nodes: list[Node], *, cuda: bool = False, **workers: Any) -> Sizing:
    return size_pool(WorkersConfig(**workers), nodes, cuda=cuda)


def placed(sizing: Sizing, nodes: list[Node]) -> int:
    """How many actors Ray finds room for: a GPU may be shared, parts of two never go to one."""
    room = 0
    for node in nodes:
        by_cpu = int(node.cpus / sizing.cpus)
        if sizing.gpus == 0:
            room += by_cpu
        elif sizing.gpus < 1:
            room += min(by_cpu, int(node.gpus) * int(1 / sizing.gpus + 1e-9))
        else:
            room += min(by_cpu, int(node.gpus // sizing.gpus))
    return min(room, sizing.count)


@given(cpu_nodes)
def test_on_cpus_the_threads_of_torch_never_exceed_the_cores(nodes: list[Node]) -> None:
    sizing = size(nodes)
    assert placed(sizing, nodes) == sizing.count
    assert sizing.count * sizing.torch_threads <= sum(node.cpus for node in nodes)
    for node in nodes:
        assert int(node.cpus / sizing.cpus) * sizing.torch_threads <= node.cpus


@given(cpu_nodes, st.integers(1, 64))
def test_a_fixed_count_shares_the_cores_as_well(nodes: list[Node], count: int) -> None:
    sizing = size(nodes, count=count)
    assert sizing.count == count
    assert placed(sizing, nodes) * sizing.torch_threads <= sum(node.cpus for node in nodes)


@given(st.one_of(cpu_nodes, gpu_nodes), st.booleans())
def test_nothing_is_zero(nodes: list[Node], cuda: bool) -> None:
    sizing = size(nodes, cuda=cuda and nodes[0].gpus > 0)
    assert min(
        sizing.count, sizing.cpus, sizing.torch_threads, sizing.decode_threads, sizing.batch_size
    ) >= 1  # fmt: skip


@given(st.integers(1, 64))
def test_one_machine_without_gpus_leaves_few_cores_idle(cpus: int) -> None:
    sizing = size([Node(cpus, 0)])
    assert sizing.count * sizing.torch_threads >= cpus * 3 / 4
    assert sizing.torch_threads <= 4


@given(gpu_nodes)
def test_every_gpu_gets_one_actor_where_the_cores_suffice(nodes: list[Node]) -> None:
    sizing = size(nodes, cuda=True)
    assert sizing.gpus == 1
    assert sizing.count == placed(sizing, nodes)
    assert sizing.count == sum(min(node.gpus, node.cpus // sizing.cpus) for node in nodes)


@given(gpu_nodes, st.sampled_from([0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0, 2.0, 4.0]))
def test_shares_of_a_gpu_are_only_as_many_as_ray_can_place(nodes: list[Node], gpus: float) -> None:
    try:
        sizing = size(nodes, cuda=True, gpus=gpus)
    except ConfigError:
        assert not any(node.gpus >= gpus for node in nodes)
        return
    assert placed(sizing, nodes) == sizing.count


def test_no_actor_gets_parts_of_two_gpus() -> None:
    assert size([Node(64, 2)], cuda=True, gpus=0.4).count == 4  # 2 on each, not 5 on both


@pytest.mark.parametrize(("cpus", "count", "threads"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (6, 2, 3),
                                                        (8, 2, 4), (16, 4, 4)])  # fmt: skip
def test_cores_are_shared_evenly(cpus: int, count: int, threads: int) -> None:
    sizing = size([Node(cpus, 0)])
    assert (sizing.count, sizing.torch_threads) == (count, threads)


def test_what_the_config_names_is_taken() -> None:
    sizing = size([Node(16, 0)], count=2, cpus=3, batch_size=5)
    assert (sizing.count, sizing.cpus, sizing.torch_threads, sizing.batch_size) == (2, 3, 3, 5)
    assert sizing.batch_size_max is None  # what is told is kept
    assert (size([Node(16, 0)]).batch_size_max or 0) >= size([Node(16, 0)]).batch_size


def test_only_nodes_with_gpus_count_in_a_mixed_cluster() -> None:
    nodes = [Node(4, 0), Node(16, 2), Node(0, 0)]
    assert wants_gpu(WorkersConfig(), nodes)
    sizing = size(nodes, cuda=True)
    assert (sizing.count, sizing.cpus) == (2, 8)


def test_gpus_0_labels_on_the_cpus_of_a_gpu_machine() -> None:
    nodes = [Node(8, 1)]
    assert not wants_gpu(WorkersConfig(gpus=0), nodes)
    assert size(nodes, gpus=0).gpus == 0


@pytest.mark.parametrize(
    ("nodes", "cuda", "workers", "said"),
    [
        ([Node(8, 0)], False, {"gpus": 1}, "the run labels on CPUs"),
        ([Node(8, 1)], True, {"gpus": 2}, "no node has more than 1"),
        ([Node(8, 4)], True, {"gpus": 1.5}, "1.5 cannot be allocated"),
        ([Node(8, 0)], False, {"cpus": 9}, "the largest node has 8"),
        ([Node(2, 1)], True, {"cpus": 4}, "the largest node has 2"),
        ([Node(0, 0)], False, {}, "no node of the cluster has a CPU core"),
        ([], False, {}, "no node of the cluster has a CPU core"),
        ([Node(0, 0)], False, {"count": 4}, "no node of the cluster has a CPU core"),
        ([Node(2, 0)], False, {"count": 4, "gpus": 1}, "the run labels on CPUs"),
    ],
)
def test_a_worker_that_fits_no_node_is_a_config_error(
    nodes: list[Node], cuda: bool, workers: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        size(nodes, cuda=cuda, **workers)
    assert said in caught.value.message
    assert caught.value.hint


def test_workers_that_are_yet_to_come_are_asked_for_as_the_config_says() -> None:
    head = [Node(0, 0)]  # of a cluster that starts its workers when they are asked for
    config = {"count": 16, "gpus": 1}
    assert wants_gpu(WorkersConfig(**config), head)
    sizing = size(head, cuda=True, **config)
    assert (sizing.count, sizing.gpus, sizing.cpus) == (16, 1, 4)
    assert size(head, cuda=True, cpus=7, **config).cpus == 7
    on_cpus = {"count": 2, "gpus": 0}
    assert not wants_gpu(WorkersConfig(**on_cpus), head)
    assert size(head, **on_cpus).count == 2

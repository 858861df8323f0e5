"""Two processes that train together take the step that one alone would take."""

from __future__ import annotations

import copy
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from workers.training.distributed import GlobalBatchNorm2d, Team, group_size, summed

BATCH = 6


def small_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )


def images() -> torch.Tensor:
    # Means far from 0, and different in every image: a rank's own statistics would show.
    torch.manual_seed(4)
    return torch.randn(BATCH, 3, 9, 11) + torch.arange(BATCH).view(-1, 1, 1, 1)


def take_steps(network: nn.Module, team: Team, slots: list[int]) -> dict[str, torch.Tensor]:
    """Two steps on these images; the loss is a mean over the global batch."""
    network.train()
    shared = team.share(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(2):
        out = shared(images()[slots])
        loss = (out**3).sum() / (BATCH * 10) * team.size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


PARTS = {"even": [[0, 2, 4], [1, 3, 5]], "uneven": [[0, 1, 2, 3], [4, 5]]}


def rank_of_two(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        team = Team.joined()
        told = team.agree(10.0 + rank)
        total = float(summed(torch.tensor(1.0 + rank)))
        states = {}
        for name, slots in PARTS.items():
            network = small_network()
            states[name] = take_steps(network, team, slots[rank])
        kinds = {type(m).__name__ for m in network.modules()}
        torch.save((team.rank, team.size, told, total, states, kinds), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"tcp://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Even and uneven parts: statistics, gradients and decisions are of all ranks."""
    alone = take_steps(small_network(), Team(), list(range(BATCH)))
    spawn(rank_of_two, (free_address(), str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]  # torch: no types
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for rank in (0, 1):
        assert found[rank][:4] == (rank, 2, 10.0, 3.0)
        assert "GlobalBatchNorm2d" in found[rank][5]
        assert "BatchNorm2d" not in found[rank][5]
    for parts in PARTS:
        first, second = (found[rank][4][parts] for rank in (0, 1))
        assert list(first) == list(alone)  # the names of a state file do not change
        for name, value in alone.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


def test_a_process_alone_is_left_as_it_is() -> None:
    network = small_network()
    before = copy.deepcopy(network)
    team = Team.joined()
    assert (team.rank, team.size, team.leads, group_size()) == (0, 1, True, 1)
    assert team.share(network) is network
    assert not any(isinstance(m, GlobalBatchNorm2d) for m in network.modules())
    value = torch.tensor(5.0)
    assert summed(value) is value
    assert team.agree(0.25) == 0.25
    shared = GlobalBatchNorm2d(8).train()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(shared(x), nn.BatchNorm2d(8).train()(x))
    assert [type(m) for m in before.modules()] == [type(m) for m in network.modules()]

"""YOLO-NAS and its loss on two processes: in float64, where rounding explains nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from tests.workers.training.test_distributed import free_address
from workers.training.distributed import Team

pytestmark = pytest.mark.slow  # super-gradients takes seconds to import, in three processes

ARCH = Path(__file__).resolve().parents[3] / "pipelines" / "assets" / "digits_nano_arch.yaml"
SIDE, BATCH, STEPS, LR = 96, 4, 50, 2e-3
# What a step of float64 may differ by, times what fifty steps of AdamW make of it.
TOLERANCE = 1e-3


def network() -> nn.Module:
    from workers.yolo_nas.network import build_network

    torch.manual_seed(1)
    arch = json.dumps(yaml.safe_load(ARCH.read_text()))
    return build_network("yolo_nas_s", arch, 3).double().train()


def batch(slots: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, targets, regions to ignore and weights of some slots of the global batch."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand((BATCH, 3, SIDE, SIDE), generator=generator, dtype=torch.float64)
    targets = torch.tensor(  # numbers of boxes that differ by rank, and one image without any
        [[0, 0, 30, 30, 24, 30], [0, 2, 70, 60, 30, 40], [1, 1, 50, 40, 60, 50],
         [2, 2, 20, 70, 30, 30], [2, 0, 60, 30, 20, 20], [2, 1, 64, 64, 40, 44]],
    ).double()  # fmt: skip
    weights = torch.tensor([1.0, 0.3, 0.8, 1.0, 0.55, 0.9], dtype=torch.float64)
    ignore = torch.tensor([[1, 0, 0, 30, 30], [3, 10, 10, 80, 80]], dtype=torch.float64)
    mine = torch.tensor([int(row[0]) in slots for row in targets])
    there = torch.tensor([int(row[0]) in slots for row in ignore])
    place = {slot: at for at, slot in enumerate(slots)}

    def renumbered(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        rows[:, 0] = torch.tensor([place[int(row[0])] for row in rows])
        return rows

    return images[slots], renumbered(targets[mine]), renumbered(ignore[there]), weights[mine]


def losses(team: Team, slots: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step over the global batch, and the gradients of the first step."""
    from workers.training.loss import RegionLoss

    class DoubleLoss(RegionLoss):
        def get_proj_conv_for_reg_max(self, *told: object, **more: object) -> torch.Tensor:
            return super().get_proj_conv_for_reg_max(*told, **more).double()

    made = network()
    shared, loss_of = team.share(made), DoubleLoss(3)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=LR)
    images, targets, ignore, weights = batch(slots)
    told, first = [], dict[str, torch.Tensor]()
    for _ in range(STEPS):
        _, raw = shared(images)
        loss, parts = loss_of(tuple(raw), targets, ignore, weights)
        optimizer.zero_grad()
        loss.backward()
        if not first:
            first = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
        optimizer.step()
        told.append(float(parts[-1]))
    return told, first


def rank_of_two(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        torch.save(losses(Team.joined(), [[0, 2], [1, 3]][rank]), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone, gradients = losses(Team(), list(range(BATCH)))
    spawn(rank_of_two, (free_address(), str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]  # torch: no types
    torch.set_num_threads(threads)
    for rank in (0, 1):
        told, first = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert told == pytest.approx(alone, rel=TOLERANCE)
        used = [name for name in gradients if gradients[name].abs().max() > 0]
        assert set(used) <= set(first)
        for name in used:
            torch.testing.assert_close(first[name], gradients[name], rtol=1e-6, atol=1e-9)
    assert alone[-1] < alone[0]

"""Two processes take a training's first steps; are they the steps that one process takes?

    python -m benchmarks.ddp_step --data FOLDER [--device cuda] [--steps 4]

FOLDER holds train.json and images. Each process has a CUDA card to itself and nccl where there are
two; nccl refuses two ranks on one card, so there both use that card and gloo, which copies CUDA
tensors through the host: the steps are the same, their speed says nothing. On CPUs gloo as well.
Fails if the two processes' weights differ, or if their first loss is not that of one process.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from benchmarks.photos import scratch
from benchmarks.rounds import Ratio, Report, say
from benchmarks.training_speed import SIDE, network

LOSS_MAY_DIFFER = 1e-3  # relative; kernels sum a batch of half the size in another order


@dataclass(frozen=True, slots=True)
class Job:
    """What all processes are told. ``backend`` is torch's; ``cards`` how many they share."""

    data: Path
    out: Path
    device: Literal["cpu", "cuda"]
    backend: str
    cards: int
    steps: int
    batch: int


def train(job: Job) -> tuple[list[float], float, dict[str, object]]:
    """Train as this process's place in its group says: loss a step, images/s, weights."""
    import torch

    from workers.images.preprocessing import Preprocessing
    from workers.training.batches import BatchSource
    from workers.training.coco_set import read_training_set
    from workers.training.distributed import Team
    from workers.training.options import FitOptions
    from workers.training.recipe.augmentation import Augmentation
    from workers.training.trainer import Trainer

    team = Team.joined()
    found = read_training_set(job.data / "train.json", job.data / "images")
    how = Preprocessing(size=(SIDE, SIDE), resize_to=(SIDE - 4, SIDE - 4))
    source = BatchSource(found, how, Augmentation(), job.batch, 0)
    never = 10**9
    fit = FitOptions(steps=never, warmup_steps=2, eval_every=never, device=job.device)
    classes = len(found.classes)
    trainer = Trainer(
        network(classes), classes, fit, fingerprint="", state=job.out / "none.pt", team=team
    )
    losses: list[float] = []
    began = time.perf_counter()
    trainer.run(
        lambda first, _: source.stream(first, job.steps, team.rank, team.size),
        lambda _: 0.0,
        lambda _: None,
        lambda report: losses.append(report.loss),
    )
    speed = job.steps * job.batch / (time.perf_counter() - began)
    state = trainer.ema_network.state_dict()
    return losses, speed, {k: v.cpu() for k, v in state.items() if isinstance(v, torch.Tensor)}


def rank_of_two(rank: int, job: Job, address: str) -> None:
    """One of the processes; its result is ``<out>/<rank>.pt``."""
    import torch
    from torch import distributed as dist

    from workers.yolo_nas.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    if job.device == "cuda":
        torch.cuda.set_device(rank % job.cards)
    dist.init_process_group(job.backend, init_method=address, rank=rank, world_size=2)
    try:
        torch.save(train(job), job.out / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def free_address() -> str:
    """Return an address on which rank 0 may listen."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"tcp://127.0.0.1:{taken.getsockname()[1]}"


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--batch", type=int, default=8, help="of both processes together")
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = made.parse_args()
    import torch
    from torch.multiprocessing.spawn import spawn

    device = cast("Literal['cpu', 'cuda']", options.device)
    cards = torch.cuda.device_count() if device == "cuda" else 0
    backend = "nccl" if cards > 1 else "gloo"
    report = Report("ddp_step", "images/s", {"steps": options.steps, "batch": options.batch})
    with scratch() as name:
        job = Job(options.data, Path(name), device, backend, cards, options.steps, options.batch)
        say(f"two processes on {cards or 'no'} card(s), {backend}")
        spawn(rank_of_two, (job, free_address()), nprocs=2)  # type: ignore[no-untyped-call]  # torch: no types
        both = [torch.load(job.out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
        alone = train(job)
    differing = [
        key for key, value in both[0][2].items() if not torch.equal(value, both[1][2][key])
    ]
    apart = [abs(a - b) / abs(b) for a, b in zip(both[0][0], alone[0], strict=True)]
    report.values = {"two processes": [both[0][1]], "one process": [alone[1]]}
    report.add("loss of two, relative to one: first step", Ratio(apart[0], apart[0], apart[0]))
    report.add("the same, last step", Ratio(apart[-1], apart[-1], apart[-1]))
    report.facts = {"backend": backend, "cards": cards, "tensors that differ": len(differing)}
    report.write(options.out)
    if differing or not apart[0] <= LOSS_MAY_DIFFER:
        say(f"{len(differing)} tensors differ between the processes; first losses: {apart[0]:.2g}")
        sys.exit(1)


if __name__ == "__main__":
    main()

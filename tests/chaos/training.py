"""Seeded kills over a small training on two workers; the result must be that of an undisturbed one.

``python -m tests.chaos.training --seeds 10`` (`make chaos-train`) prints one line a seed and exits
1 if any promise was broken. Each seed trains a tiny network on CPUs with a Ray of its own, and has
one to three troubles at random steps: a worker is killed, the driver is killed, or the driver is
asked to stop (SIGTERM, as a scheduler does). After the driver has ended the same command continues.
Every third seed asks for ``workers.count: [1, 2]``. Then:

- every step was taken; one that was taken again had the same loss, to the last bit;
- at most the steps since the last state were taken again for each trouble;
- final weights, averages and validation history are those of the undisturbed training: to the last
  bit, and to 1e-4 of each tensor's largest value where a worker may have been missing for a while,
  since sums over one process are taken in another order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from pipelines.demo.digits import make_pages
from pipelines.training.validation import Scores
from tests.support.patience import patient
from workers.training.trainer import StepReport

ROOT = Path(__file__).resolve().parents[2]
ARCH = ROOT / "pipelines" / "assets" / "digits_nano_arch.yaml"
STEPS, SAVED_EVERY = 10, 2
TROUBLES = ("worker", "driver", "stop")
_DRIVERS = 8  # a person gives up at some point
_CLOSE = 1e-4


class Witness:
    """A listener that writes down every step of the leading worker."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self._file = (folder / "steps.jsonl").open("a", buffering=1)

    def step(self, report: StepReport) -> None:
        """Write step and loss."""
        self._file.write(json.dumps([report.step, report.loss]) + "\n")

    def validated(self, step: int, scores: Scores) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Trouble:
    """At ``step`` this happens, ``late_s`` seconds after the leading worker reported it."""

    kind: str
    step: int
    late_s: float


@dataclass(slots=True)
class Outcome:
    """What a schedule left: broken promises, drivers started, and steps taken again."""

    broken: list[str] = field(default_factory=list)
    drivers: int = 0
    again: int = 0


def schedule(seed: int) -> list[Trouble]:
    """Return the troubles of a seed, in order of their steps."""
    chance = random.Random(seed)
    count = chance.randint(1, 3)
    steps = sorted(chance.sample(range(1, STEPS), count))
    return [Trouble(chance.choice(TROUBLES), step, chance.uniform(0, 0.3)) for step in steps]


def write_config(folder: Path, data: dict[str, str], *, elastic: bool = False) -> Path:
    """Write the training's config; its output is ``folder``/out."""
    fields = {
        "name": "tiny", "output": str(folder / "out"), "train": data, "val": data,
        "model": {"arch": str(ARCH)}, "image_size": 64, "batch_size": 4, "precision": "fp32",
        "steps": STEPS, "eval_every": SAVED_EVERY, "threads": 1, "warmup_steps": 2,
        "lr": 1e-6 if elastic else 1e-3,  # where sums may be in another order, AdamW must not
        "report": ["tests.chaos.training:Witness"],  # make rounding large
        "workers": {"count": [1, 2] if elastic else 2},
    }  # fmt: skip
    folder.mkdir(parents=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def taken(folder: Path) -> list[tuple[int, float]]:
    """Return the steps and losses that were reported, in order."""
    path = folder / "out" / "steps.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # the last line of a process that was killed
            step, loss = json.loads(line)
            found.append((int(step), float(loss)))
    return found


def start(config: Path) -> subprocess.Popen[str]:
    """Start a driver with a Ray of its own."""
    command = [sys.executable, "-m", "pipelines.cli.main", "train", str(config), "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (config.parent / "driver.log").open("a") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
            env={**environment, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip


def strike(driver: subprocess.Popen[str], kind: str, chance: random.Random) -> None:
    """Let one trouble happen."""
    if kind == "worker":
        workers = [p for p in _below(driver) if "RayTrainWorker" in " ".join(_command(p))]
        if workers:
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
        return
    with suppress(ProcessLookupError):
        driver.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGTERM)


def _below(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(driver.pid).children(recursive=True)
    return []


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def run(config: Path, troubles: Sequence[Trouble], seed: int) -> Outcome:
    """Train to the end through the troubles."""
    outcome, waiting, chance = Outcome(), list(troubles), random.Random(seed)
    folder = config.parent
    while outcome.drivers < _DRIVERS:
        outcome.drivers += 1
        driver = start(config)
        deadline = time.monotonic() + patient(240)
        while driver.poll() is None and time.monotonic() < deadline:
            done = max((step for step, _ in taken(folder)), default=0)
            if waiting and done >= waiting[0].step:
                trouble = waiting.pop(0)
                time.sleep(trouble.late_s)
                strike(driver, trouble.kind, chance)
            time.sleep(0.02)
        if driver.poll() is None:
            outcome.broken.append("a driver did not end")
            driver.kill()
        code = driver.wait()
        _sweep(driver)
        if code == 0:
            return outcome
        if code not in (-signal.SIGKILL, 130, 143, 128 + signal.SIGTERM, -signal.SIGTERM):
            outcome.broken.append(f"a driver ended with exit code {code}")
    outcome.broken.append(f"not done after {_DRIVERS} drivers")
    return outcome


def _sweep(driver: subprocess.Popen[str]) -> None:
    """Wait until what a killed driver left has ended by itself: it must not write any more."""
    deadline = time.monotonic() + patient(60)
    while time.monotonic() < deadline:
        if not [p for p in psutil.process_iter() if _session(p) == driver.pid]:
            return
        time.sleep(0.2)


def _session(process: psutil.Process) -> int:
    with suppress(OSError):
        return os.getsid(process.pid)
    return -1


def check(folder: Path, reference: Path, troubles: int, *, exact: bool) -> tuple[list[str], int]:
    """Return broken promises, and how many steps were taken again."""
    broken = []
    steps, expected = taken(folder), dict(taken(reference))
    by_step: dict[int, set[float]] = {}
    for step, loss in steps:
        by_step.setdefault(step, set()).add(loss)
    if sorted(by_step) != list(range(1, STEPS + 1)):
        broken.append(f"steps {sorted(by_step)}")
    for step, losses in by_step.items() if exact else ():
        if losses != {expected[step]}:
            broken.append(f"step {step} had the losses {sorted(losses)}, not {expected[step]}")
    again = len(steps) - len(by_step)
    if again > troubles * SAVED_EVERY:
        broken.append(f"{again} steps were taken again for {troubles} troubles")
    own, other = _state(folder), _state(reference)
    if own["progress"]["step"] != STEPS:
        broken.append(f"it ended at step {own['progress']['step']}")
    for part in ("network", "ema"):
        broken += _differing(part, own[part], other[part], exact=exact)
    if exact and own["progress"]["history"] != other["progress"]["history"]:
        broken.append("another history of validations")
    return broken, again


def _state(folder: Path) -> dict[str, Any]:
    path = folder / "out" / "last_state.pt"
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _differing(
    part: str, own: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, exact: bool
) -> list[str]:
    found = []
    for name, value in own.items():
        wanted = other[name]
        limit = 0.0 if exact else _CLOSE * float(wanted.abs().max().clamp(min=1e-3))
        if float((value.double() - wanted.double()).abs().max()) > limit:
            found.append(f"{part}.{name}")
    return [f"{len(found)} tensors of {part} differ, such as {found[0]}"] if found else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the schedules of some seeds; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    given = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="labelfleet-chaos-") as root:
        pages = make_pages(Path(root) / "pages", images=6, split="train", broken=False)
        data = {"annotations": str(pages.truth), "images": str(pages.images)}
        references: dict[bool, Path] = {}
        for seed in range(given.first, given.first + given.seeds):
            elastic = seed % 3 == 2
            if elastic not in references:
                references[elastic] = Path(root) / f"reference-{elastic}"
                calm = run(write_config(references[elastic], data, elastic=elastic), (), 0)
                if calm.broken:
                    print(f"the undisturbed training: {calm.broken}")
                    return 1
            began, troubles = time.monotonic(), schedule(seed)
            config = write_config(Path(root) / str(seed), data, elastic=elastic)
            outcome = run(config, troubles, seed)
            with suppress(FileNotFoundError):
                broken, outcome.again = check(
                    config.parent, references[elastic], len(troubles), exact=not elastic
                )
                outcome.broken += broken
            told = ", ".join(f"{one.kind} at {one.step}" for one in troubles)
            verdict = "; ".join(outcome.broken) or "ok"
            failed += bool(outcome.broken)
            print(
                f"seed {seed}{' elastic' if elastic else ''}: {told}: {outcome.drivers} drivers, "
                f"{outcome.again} steps again, {time.monotonic() - began:.0f} s: {verdict}",
                flush=True,
            )
            if outcome.broken:
                print((config.parent / "driver.log").read_text()[-3000:], flush=True)
    print(f"{given.seeds - failed} of {given.seeds} schedules kept every promise")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

"""All that only a machine with an NVIDIA GPU can show, in at most 12 minutes on one card.

    python -m benchmarks.gpu_day [--dry-run | --cpu] [--budget 720] [--only NAMES] [--wheels FOLDER]

Each step is a process of its own with a time limit. Steps for which no time is left are named, and
not started. ``<out>/gpu_day.json`` is written before the first step and after each, with the card,
versions, commit, and each step's status, figures and last lines; ``<out>/gpu_day.md`` is a table.
Nothing is fetched. Any torch that sees the card will do (our pin, or torch 2.11 with CUDA 13); what
is there is in the record, and steps whose packages are missing are skipped and named. --wheels
installs a folder's wheels below --out, without their dependencies, for these steps alone.

Exit code: 0, every step passed or cannot run here; 1, a step failed, took too long or was not
started; 2, nothing was run (no GPU, or wrong arguments); 130, interrupted.

--cpu runs what needs no GPU, very small, to test this script: its figures mean nothing.
--shared FOLDER adds the compact model's mAP on bccd (see benchmarks/runtimes.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.rounds import machine, say
from benchmarks.timed_steps import Outcome, Record, Step, run_steps

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 720.0
_PROBE_S = 240.0  # a loaded machine takes a minute to import torch; the budget counts it
_TESTS = ROOT / "tests/workers/runtimes"
# In a process of its own: this one must not hold memory on the card.
_PROBE = """
import importlib.metadata as m, json, torch
names = ("torchvision", "tensorrt", "super-gradients", "onnxruntime", "numpy")
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
there = torch.cuda.is_available()
props = torch.cuda.get_device_properties(0) if there else None
print(json.dumps({
    "card": props.name if props else None,
    "cards": torch.cuda.device_count() if there else 0,
    "memory, GiB": round(props.total_memory / 2**30, 1) if props else None,
    "compute capability": f"{props.major}.{props.minor}" if props else None,
    "torch": torch.__version__, "CUDA of torch": torch.version.cuda,
    "cuDNN": torch.backends.cudnn.version() if there else None,
    **{name: version(name) for name in names},
}))
"""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much the steps do, on a GPU or small on CPUs, and what their time limits are times."""

    device: str
    images: int
    rounds: int
    pages: int
    train_steps: int
    batch: int
    patience: int


ON_GPU = Scale("cuda", images=1024, rounds=3, pages=128, train_steps=20, batch=32, patience=1)
ON_CPU = Scale("cpu", images=2, rounds=1, pages=4, train_steps=1, batch=2, patience=5)


def steps(scale: Scale, out: Path, shared: Path | None) -> list[Step]:
    """Return all steps in order: the surest and most wanted first, TensorRT's long builds last."""
    cuda = scale.device == "cuda"
    device, rounds, images = scale.device, str(scale.rounds), str(scale.images)
    fast = "torch-fp16" if cuda else "torch-fp32"
    data = str(out / "training")
    sized = ("--images", images, "--rounds", rounds)
    trt = None if cuda and _has("tensorrt") else "TensorRT is not installed"
    trt = trt if cuda else "needs a GPU"
    sg = None if _has("super_gradients") else "super-gradients is not installed"

    def tests(name: str, file: str, only: str, limit_s: float, unable: str | None) -> Step:
        report = out / f"{name}.xml"
        command = (
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-rs",
            "-m", "slow", "-k", only, f"--junitxml={report}", str(_TESTS / file),
        )  # fmt: skip
        return Step(name, command, limit_s, report, unable)

    def bench(
        name: str, module: str, limit_s: float, *more: str, unable: str | None = None
    ) -> Step:
        where = out / name
        command = (sys.executable, "-m", f"benchmarks.{module}", "--out", str(where), *more)
        return Step(name, command, limit_s, where / f"{module}.json", unable)

    on = ("--device", device)
    shared_on = (str(shared), "--no-speed", *on, "--only", f"torch-fp32,{fast}")
    found = [
        tests("cuda-tests", "test_cuda.py", "test", 80, None if cuda else "needs a GPU"),
        Step("training-data", _pages_command(out / "training", scale.pages), 30),
        bench("ddp", "ddp_step", 60, *on, "--data", data, "--batch", str(scale.batch), unable=sg),
        bench("efficiency", "efficiency", 70, *on, *sized, "--variants", f"{fast},free"),
        bench("predict", "vs_super_gradients", 60, *on, *sized, "--variants", fast,
              "--batches", "32,64" if cuda else "1", unable=sg),
        bench("accuracy", "precisions", 55, *on, "--images", str(scale.pages), "--variants",
              "torch-fp32,torch-fp16,torch-bf16" if cuda else "torch-fp32,onnx-fp32"),
        bench("training", "training_speed", 70, "--data", data, "--steps", str(scale.train_steps),
              "--rounds", rounds, "--batch", str(scale.batch), unable=sg),
        bench("jpeg", "jpeg_decoders", 20, *on, *sized),
        tests("tensorrt-tests", "test_runtime_parity.py", "tensorrt", 60, trt),
        bench("tensorrt-accuracy", "precisions", 55, *on, "--images", str(scale.pages),
              "--variants", "tensorrt-fp16,tensorrt-int8", unable=trt),
        bench("tensorrt-efficiency", "efficiency", 80, *on, *sized, "--variants", "tensorrt-fp16",
              unable=trt),
    ]  # fmt: skip
    if shared is not None:
        found.insert(6, bench("bccd", "runtimes", 60, *shared_on))
    return [replace(step, limit_s=step.limit_s * scale.patience) for step in found]


def _pages_command(dest: Path, pages: int) -> tuple[str, ...]:
    """Write the demo's pages as a training set: ``train.json`` beside ``images``."""
    code = (
        "import pathlib, shutil, sys\n"
        "from pipelines.demo.digits import make_pages\n"
        "dest = pathlib.Path(sys.argv[1])\n"
        "made = make_pages(dest, images=int(sys.argv[2]), split='train', broken=False)\n"
        "shutil.copyfile(made.truth, dest / 'train.json')\n"
    )
    return sys.executable, "-c", code, str(dest), str(pages)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def probe(environment: dict[str, str]) -> dict[str, Any]:
    """Return what torch says of the machine and the versions; ``card`` is None without a GPU.

    Raises:
        SystemExit: torch cannot be asked.
    """
    try:
        done = subprocess.run(
            (sys.executable, "-c", _PROBE), env=environment, cwd=ROOT, capture_output=True,
            text=True, check=False, timeout=_PROBE_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        _leave(f"torch did not answer within {_PROBE_S:.0f} s; see nvidia-smi")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        _leave(f"torch cannot be asked for a GPU: {last:.200}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return dict(found)


def facts_of(found: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """Return what the record says beside its steps."""
    text = (ROOT / "pyproject.toml").read_text()
    pin = re.search(r'"torch==([^"]+)"', text)
    return {
        **found,
        "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "pinned torch": pin[1] if pin else None,
        "host": machine().rpartition(", ")[0],
        "commit": _line("git", "rev-parse", "HEAD"),
        "changed since": bool(_line("git", "status", "--porcelain", "-uno")),
        "python": sys.version.split()[0],
        "size": "on a GPU" if scale is ON_GPU else "small, on CPUs: the figures mean nothing",
    }


def _line(*command: str) -> str | None:
    """Return the first line that a program prints; None: there is none, or no such program."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return lines[0] if lines else None


def install_wheels(folder: Path, dest: Path) -> None:
    """Install a folder's wheels below ``dest``, from nothing but that folder.

    Raises:
        SystemExit: there are none, or pip refuses one.
    """
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        _leave(f"no wheel in {folder}")
    done = subprocess.run(
        (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
         "--target", str(dest), *wheels), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        _leave(f"pip did not install {folder}'s wheels: {done.stderr.strip()[-300:]}")


def _leave(why: str) -> NoReturn:
    sys.stderr.write(f"gpu_day: {why}\n")
    raise SystemExit(2)


def _interrupted(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    how = made.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="list the steps and their limits")
    how.add_argument("--cpu", action="store_true", help="what CPUs can, small: tests this script")
    made.add_argument("--budget", type=float, help="seconds; default 720, or 3600 with --cpu")
    made.add_argument("--only", help="comma-separated names of steps")
    made.add_argument("--shared", type=Path, help="folder with data/bccd and models/")
    made.add_argument("--wheels", type=Path, help="folder of wheels that the steps need")
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks/gpu_day"))
    return made.parse_args(given)


def picked(found: list[Step], only: str | None) -> list[Step]:
    """Return the steps that ``--only`` names; all of them without it."""
    if only is None:
        return found
    names = [name.strip() for name in only.split(",")]
    unknown = sorted(set(names) - {step.name for step in found})
    if unknown:
        _leave(f"no step {', '.join(unknown)}; there are {', '.join(s.name for s in found)}")
    return [step for step in found if step.name in names]


def main(given: Sequence[str] | None = None) -> int:
    """Run the day; return the exit code."""
    began = time.monotonic()
    options = arguments(given)
    out: Path = options.out.resolve()
    scale = ON_CPU if options.cpu else ON_GPU
    budget_s = BUDGET_S * scale.patience if options.budget is None else options.budget
    target = out / "wheels"
    if options.wheels is not None and not options.dry_run:
        install_wheels(options.wheels, target)
        sys.path.insert(1, str(target))
    shared = None if options.shared is None else options.shared.resolve()
    todo = picked(steps(scale, out, shared), options.only)
    if options.dry_run:
        for step in todo:
            why = "" if step.unable is None else f"  ({step.unable})"
            say(f"{step.name:20s} {step.limit_s:4.0f} s{why}")
        return 0
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "PYTHONUNBUFFERED": "1"}
    if options.wheels is not None:
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{target}"
    found = probe(environment)
    if found["card"] is None and not options.cpu:
        _leave("torch sees no NVIDIA GPU here; --cpu tests this script without one")
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out / "gpu_day.json", facts_of(found, scale), [Outcome(s.name) for s in todo])
    return carry_out(todo, record, began + budget_s - time.monotonic(), environment)


def carry_out(
    todo: Sequence[Step], record: Record, budget_s: float, environment: dict[str, str]
) -> int:
    """Run the steps, write the table, and return the exit code, whatever happens on the way."""
    say("\n".join(f"{name}: {value}" for name, value in record.facts.items()))
    before = signal.signal(signal.SIGTERM, _interrupted)
    code = 130
    try:
        run_steps(todo, record, budget_s=budget_s, environment=environment, say=say)
        code = 0 if record.good else 1
    except KeyboardInterrupt:
        say("interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)
        for outcome in record.outcomes:
            if outcome.status == "running":
                outcome.status, outcome.why = "failed", "interrupted"
        record.write()
        record.path.with_suffix(".md").write_text(record.table())
    say(f"\n{record.table()}\n{record.path}: " + ("good" if record.good else "NOT good"))
    return code


if __name__ == "__main__":
    sys.exit(main())

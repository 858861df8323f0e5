"""Seeded schedules of stopped raylets: SIGSTOP at any moment of a run, for a while or for good.

``python -m tests.chaos.raylets --seeds 6`` (part of `make chaos`) prints a line a schedule and a
summary, and exits 1 if a promise was broken. A stopped raylet neither replies nor closes
its connections, so a process that waits for it would wait forever. Each run has its own Ray. After
each run:

- the run has ended within ``LIMIT_S``, with a documented exit code and without a traceback;
- its lock is released, and no process of its Ray is left;
- the same command, once more, ends with 0: every image has exactly one row, and ``verify`` finds
  no difference.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from storage.runs.lock import LOCK_KEY
from storage.stores.open import open_store
from tests.e2e.jobs import SLOW_MODEL, SLOW_WORKERS, Job
from tests.support.patience import patient
from tests.support.samples.tiny_run import fill_folder

Moment = Literal["starting", "labelling", "ending"]

IMAGES, SHARD_SIZE = 32, 2
SHARDS = IMAGES // SHARD_SIZE
LIMIT_S = 300.0
_CODES = (0, 1, 3, 130)  # of docs/operations.md: those that a run may end with here
# How soon Ray's head gives up a node that does not answer; a minute with its own settings.
_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """One seed's plan.

    Attributes:
        moment: when the raylet stops: before there is a worker, between two commits, or once
            everything is committed.
        commits: how many shards are committed by then.
        wakes_after_s: until it goes on; None: never.
        interrupted: a person presses Ctrl-C while it stands still.
    """

    seed: int
    moment: Moment
    commits: int
    wakes_after_s: float | None
    interrupted: bool


def schedule(seed: int) -> Schedule:
    """The plan of a seed."""
    rng = random.Random(seed)
    moments: list[Moment] = ["starting", "labelling", "ending"]
    moment = moments[seed % 3]
    commits = {"starting": 0, "labelling": rng.randint(1, SHARDS - 2), "ending": SHARDS}[moment]
    wakes = rng.choice([None, None, 0.5, 5.0, 20.0])
    return Schedule(seed, moment, commits, wakes, rng.random() < 0.25)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one schedule went; ``broken`` names the promises that were not kept."""

    plan: Schedule
    code: int | None
    seconds: float
    committed: int
    broken: tuple[str, ...]
    said: str

    def line(self) -> str:
        """For the log."""
        plan = self.plan
        wakes = "for good" if plan.wakes_after_s is None else f"for {plan.wakes_after_s:g} s"
        verdict = "ok" if not self.broken else "BROKEN: " + "; ".join(self.broken)
        interrupted = ", interrupted" if plan.interrupted else ""
        return (
            f"seed {plan.seed:3}  {plan.moment} at {plan.commits} shards, {wakes}{interrupted}: "
            f"exit {self.code} after {self.seconds:.0f} s, {self.committed} of {SHARDS} shards  "
            f"{verdict}"
        )


def run_schedule(seed: int, folder: Path) -> Verdict:
    """One schedule, and what it broke."""
    plan = schedule(seed)
    fill_folder(folder / "in", IMAGES)
    fields = {
        "source": {"url": str(folder / "in"), "shard_size": SHARD_SIZE},
        "model": SLOW_MODEL,
        "workers": {**SLOW_WORKERS, "depth": 1},
    }
    job = Job(folder, str(folder / "in"), str(folder / "out"), env=_QUICK, fields=fields)
    broken: list[str] = []
    with job.started() as driver:
        ray = _stop_raylet(job, driver, plan)
        began_s = time.monotonic()
        code, said = _end_of(driver)
        seconds = time.monotonic() - began_s
    broken.extend(_promises(job, code, said, ray))
    committed = job.commits()
    for process in ray:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    broken.extend(_continued(job))
    return Verdict(plan, code, seconds, committed, tuple(broken), said)


def _stop_raylet(job: Job, driver: subprocess.Popen[str], plan: Schedule) -> list[psutil.Process]:
    """Stop the driver's raylet at the plan's moment; return all processes of its Ray."""
    limit = time.monotonic() + patient(LIMIT_S)
    raylet = None
    while raylet is None or job.commits() < plan.commits:
        assert time.monotonic() < limit, "the moment did not come"
        raylet = raylet or _raylet(driver)
        if driver.poll() is not None:
            break
        time.sleep(0.02)
    ray = [p for p in _descendants(driver) if p.pid != driver.pid]
    if raylet is not None:
        with suppress(psutil.NoSuchProcess):
            raylet.suspend()
        if plan.wakes_after_s is not None:
            timer = threading.Timer(plan.wakes_after_s, _wake, [raylet])
            timer.daemon = True
            timer.start()
    if plan.interrupted:
        time.sleep(1.0)
        with suppress(ProcessLookupError):
            os.kill(driver.pid, signal.SIGINT)
    return ray


def _raylet(driver: subprocess.Popen[str]) -> psutil.Process | None:
    for process in _descendants(driver):
        with suppress(psutil.Error):
            if process.name() == "raylet":
                return process
    return None


def _descendants(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return list(psutil.Process(driver.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _wake(raylet: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        raylet.resume()


def _end_of(driver: subprocess.Popen[str]) -> tuple[int | None, str]:
    """Its exit code and stderr; None where it did not end in time."""
    try:
        _, err = driver.communicate(timeout=patient(LIMIT_S))
    except subprocess.TimeoutExpired:
        driver.kill()
        return None, driver.communicate()[1]
    return driver.returncode, err


def _promises(job: Job, code: int | None, said: str, ray: list[psutil.Process]) -> Iterator[str]:
    """Every promise about the run's end that is not kept."""
    if code is None:
        yield f"it did not end within {LIMIT_S:g} s"
    elif code not in _CODES:
        yield f"exit code {code}"
    if "Traceback" in said:
        yield "a traceback"
    if code is not None and any(o.key == LOCK_KEY for o in open_store(job.output).list(LOCK_KEY)):
        yield "its lock is still there"
    _, left = psutil.wait_procs(ray, timeout=patient(10))
    if left and code is not None:
        yield f"left behind: {', '.join(sorted({process.name() for process in left}))}"


def _continued(job: Job) -> Iterator[str]:
    """Every promise about the same command, once more, that is not kept."""
    code, summary, err = job.run()
    if code != 0:
        yield f"continued with exit code {code}: {err[-300:]}"
        return
    try:
        rows = job.rows()
    except AssertionError as exc:
        yield f"continued: {exc}"
        return
    if len(rows) != IMAGES or summary["quarantined"]:
        yield f"continued: {len(rows)} of {IMAGES} rows, {summary['quarantined']} in quarantine"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6, help="how many schedules")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    arguments = parser.parse_args()
    verdicts = []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            verdicts.append(run_schedule(seed, Path(folder)))
        print(verdicts[-1].line(), flush=True)
        if verdicts[-1].broken:
            print(verdicts[-1].said, flush=True)
    broken = [verdict.plan.seed for verdict in verdicts if verdict.broken]
    slowest_s = max((verdict.seconds for verdict in verdicts), default=0.0)
    print(
        f"{len(verdicts)} stopped raylets, the slowest end took {slowest_s:.0f} s; promises "
        f"broken: {f'by seeds {broken}' if broken else 'none'}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

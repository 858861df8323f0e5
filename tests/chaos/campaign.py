"""Seeded schedules of kills and storage faults over a real small run; every promise checked after.

``python -m tests.chaos.campaign --seeds 100`` (`make chaos`) prints one line
a schedule and a summary, and exits 1 if any promise was broken. After each schedule:

- every image has exactly one live row, and rows are those of an undisturbed run (boxes to 0.05 px,
  scores to 1e-3, everything else exactly);
- ``verify`` finds no difference, nothing is quarantined, and ``gc`` leaves nothing but the run;
- at the end, the driver's memory has not grown from the first ten schedules to the last ten.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from pipelines.cluster.nodes import cluster_nodes
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.cluster.sizing import size_pool
from pipelines.dispatch.tally import Caller
from pipelines.labelling.open_run import open_run
from pipelines.labelling.run import Side, drive, release_quarantine
from pipelines.labelling.work import find_work
from pipelines.runs.gc import collect_garbage
from pipelines.runs.status import RunStatus, run_status
from pipelines.runs.verify import verify_run
from storage.errors import LabelfleetError
from storage.runs.lock import LOCK_KEY, RunLock, run_lock
from storage.stores.open import open_store
from tests.chaos.schedule import Trouble, schedule
from tests.chaos.world import World, world
from tests.support.samples.same_rows import differing
from tests.support.servers.s3 import weed_server

_DRIVERS = 15  # a person gives up at some point
_GROWN_MB = 60.0
_OURS = re.compile(
    r"run\.json|source/\d+\.parquet|annotations/[0-9a-f]{16}\.parquet|ledger/[\w-]+/\d+\.jsonl"
)


class Crash(Exception):
    """The driver is dead."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one schedule went; ``broken`` names the promises that were not kept."""

    seed: int
    met: Counter[str]
    drivers: int
    seconds: float
    rss_mb: float
    broken: tuple[str, ...]
    said: str

    def line(self) -> str:
        """For the log."""
        met = ", ".join(f"{kind} ×{n}" for kind, n in sorted(self.met.items()) if n) or "nothing"
        verdict = "ok" if not self.broken else "BROKEN: " + "; ".join(self.broken)
        return (
            f"seed {self.seed:3}  {self.drivers} drivers  {self.seconds:5.1f} s  "
            f"{self.rss_mb:4.0f} MB  {verdict}  [{met}]"
        )


def run_once(there: World, trouble: Trouble) -> RunStatus:
    """One driver, from its lock to its last look; as ``labelfleet run``, on workers that are there.

    Raises:
        LabelfleetError: as ``labelfleet run`` would end with.
        Crash: it is dead, and has tidied up nothing.
    """
    config = there.config
    output = open_store(config.output, config.storage.options())
    with run_lock(output, "chaos") as lock:
        run = open_run(config, cuda=False)
        work = find_work(run, config, None)
        if work.total:
            sizing = size_pool(config.workers, cluster_nodes(), cuda=False)
            side = Side(Caller(), _guard(lock, trouble))
            drive(config, run, there.pool.again(), sizing, work, side)  # type: ignore[arg-type]
        release_quarantine(run.manifest)
        return run_status(run.manifest)


def _guard(lock: RunLock, trouble: Trouble) -> Callable[[], None]:
    def check() -> None:
        if trouble.crashing.is_set():
            raise Crash
        lock.check()

    return check


def persist(there: World, trouble: Trouble) -> int:
    """As a person or a cron job does: the same command again, until it says that all is done.

    Returns:
        How many drivers it took.
    """
    for drivers in range(1, _DRIVERS + 1):
        try:
            status = run_once(there, trouble)
            if not status.left and not status.quarantined:
                return drivers
        except (LabelfleetError, Crash) as exc:
            print(f"driver {drivers}: {type(exc).__name__}: {exc}", file=sys.stderr)
        trouble.heal()
        # A new driver would find the old one's process dead; here both are this process.
        there.store.delete(LOCK_KEY)
    raise AssertionError(f"not done after {_DRIVERS} drivers")


def run_schedule(there: World, seed: int) -> Verdict:
    """One schedule, and what it broke."""
    trouble = Trouble(schedule(seed), there.strike)
    began_s = time.monotonic()
    broken: list[str] = []
    drivers = 0
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        there.proxy.chaos = trouble
        try:
            drivers = persist(there, trouble)
        except AssertionError as exc:
            broken.append(str(exc))
        there.proxy.chaos = None
        there.quiet()
        try:
            broken.extend(check(there))
        except Exception as exc:  # noqa: BLE001 - the campaign goes on, and tells
            broken.append(f"{type(exc).__name__}: {exc}")
    there.clear()
    there.proxy.remembered.clear()
    there.proxy.requests.clear()
    seconds = time.monotonic() - began_s
    return Verdict(seed, trouble.met, drivers, seconds, _rss_mb(), tuple(broken), said.getvalue())


def check(there: World) -> Iterator[str]:
    """Every promise that is not kept."""
    manifest = there.manifest()
    rows = there.rows(manifest)
    if rows.keys() != there.images:
        yield f"{len(there.images - rows.keys())} images lost, {len(rows)} rows"
    if there.reference and (other := differing(rows, there.reference)):
        yield f"{len(other)} rows differ from the undisturbed run's, {other[0]} for one"
    found = verify_run(manifest)
    if not found.clean:
        yield f"verify: {found.differences[0].key}: {found.differences[0].what}"
    collect_garbage(manifest, older_than_s=0)
    left = [o.key for o in there.store.list() if not _OURS.fullmatch(o.key)]
    if left:
        yield f"left behind: {', '.join(left[:3])}"
    if sum(1 for _ in there.store.list("annotations/")) != found.listed:
        yield "gc left annotation objects that do not belong to a live shard"


def _rss_mb() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 2**20


def undisturbed(there: World) -> None:
    """The run that the others are held against."""
    there.clear()
    with contextlib.redirect_stderr(io.StringIO()):
        assert persist(there, Trouble(schedule(0), lambda blow, who: False)) >= 1
    assert not list(check(there))
    there.reference = there.rows(there.manifest())
    assert sum(len(row.detections) for row in there.reference.values()) > 20
    there.clear()


def campaign(there: World, seeds: Sequence[int], minutes: float) -> list[Verdict]:
    """All schedules, one after the other, each on its line; none is begun after ``minutes``."""
    verdicts: list[Verdict] = []
    until_s = time.monotonic() + minutes * 60
    for seed in seeds:
        if time.monotonic() > until_s:
            print(f"{minutes:g} minutes are over: {len(verdicts)} of {len(seeds)} schedules ran")
            break
        verdicts.append(run_schedule(there, seed))
        print(verdicts[-1].line(), flush=True)
        if verdicts[-1].broken:
            print(verdicts[-1].said, flush=True)
    return verdicts


def grown_mb(verdicts: Sequence[Verdict]) -> float:
    """Median memory of the last ten schedules less that of ten after the first ten."""
    rss = [verdict.rss_mb for verdict in verdicts]
    return median(rss[-10:]) - median(rss[10:20]) if len(rss) >= 40 else 0.0


def summary(verdicts: Sequence[Verdict]) -> str:
    """The campaign in a few lines."""
    met = sum((verdict.met for verdict in verdicts), Counter())
    broken = [verdict.seed for verdict in verdicts if verdict.broken]
    seconds = sorted(verdict.seconds for verdict in verdicts)
    lines = [
        f"{len(verdicts)} schedules, {sum(met.values())} faults, "
        f"{sum(verdict.drivers for verdict in verdicts)} drivers, {sum(seconds):.0f} s "
        f"(median {median(seconds):.1f} s, longest {seconds[-1]:.1f} s)",
        "faults: " + ", ".join(f"{kind} ×{n}" for kind, n in met.most_common()),
        f"driver's memory, last ten schedules less the second ten: {grown_mb(verdicts):+.0f} MB",
        f"promises broken: {f'by seeds {broken}' if broken else 'none'}",
    ]
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many schedules")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin none after so long")
    arguments = parser.parse_args()

    checkpoint = Path(__file__).parents[2] / "pipelines/assets/digits_nano.safetensors"
    with tempfile.TemporaryDirectory() as folder, weed_server() as server:
        os.environ.update(server.env())
        with ray_cluster("local"), world(server, Path(folder), checkpoint) as there:
            undisturbed(there)
            seeds = range(arguments.first, arguments.first + arguments.seeds)
            verdicts = campaign(there, seeds, arguments.minutes)
    print(summary(verdicts))
    failed = any(verdict.broken for verdict in verdicts) or grown_mb(verdicts) > _GROWN_MB
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast the Dispatcher keeps its books: a thousand simulated workers, a million shards.

    python benchmarks/dispatch_scale.py [--shards 1000000] [--workers 1000] [--json F] [--plot F]

The clock is simulated, the bookkeeping is real: every shard is assigned, takes a random time, and
ends; one in 200 attempts fails, one in 2,000 takes its worker with it, one shard in 10,000 always
fails, a tenth of the workers is five times slower. At the end all shards are done or quarantined,
none twice. What is timed is the time inside the Dispatcher alone; memory is the process's, read
along the way.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from pipelines.dispatch.dispatcher import Dispatcher, DispatchRules
from storage.records import Shard, StoredObject

FAILS, KILLS = 1 / 200, 1 / 2000
P = ParamSpec("P")
R = TypeVar("R")
POISON = 10_000  # every shard of this interval fails on any worker


@dataclass(slots=True)
class Figures:
    """What was measured."""

    shards: int
    workers: int
    done: int = 0
    quarantined: int = 0
    requeued: int = 0
    deaths: int = 0
    copies: int = 0
    seconds: float = 0.0
    shards_per_s: float = 0.0
    simulated_hours: float = 0.0
    rss_mib: list[tuple[int, float]] = field(default_factory=list)
    rate: list[tuple[int, float]] = field(default_factory=list)


def shards(count: int) -> Iterator[Shard]:
    """Tars, made as they are asked for."""
    for i in range(count):
        yield Shard(f"{i:016x}", "tar", (StoredObject(f"shards/{i:09d}.tar", 1 << 28, "e"),))


def rss_mib() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Simulation:
    """Workers that take shards from a real Dispatcher, on a clock of its own."""

    def __init__(
        self,
        count: int,
        workers: int,
        seed: int = 0,
        *,
        rules: DispatchRules,
        poison: int = POISON,
        kills: float = KILLS,
    ) -> None:
        self.poison, self.kills = poison, kills
        self.random = random.Random(seed)
        self.figures = Figures(count, workers)
        self.dispatcher = Dispatcher(shards(count), rules)
        self.names = (f"worker-{i}" for i in itertools.count())
        self.slow: dict[str, float] = {}
        self.events: list[tuple[float, int, str, str]] = []  # when, tie-breaker, worker, shard
        self.ties = itertools.count()
        self.now_s = 0.0
        self.seen: bytearray = bytearray(count)
        for _ in range(workers):
            self.join()

    def join(self) -> None:
        """A new worker."""
        name = next(self.names)
        self.slow[name] = 5.0 if self.random.random() < 0.1 else 1.0
        self.timed(self.dispatcher.worker_joined, name)

    def timed(self, call: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Count the time inside the Dispatcher."""
        began = time.perf_counter()
        answer = call(*arguments, **options)
        self.figures.seconds += time.perf_counter() - began
        return answer

    def run(self, sample_every: int) -> Figures:
        """Until nothing is left."""
        next_sample = 0
        before_s, before_n = 0.0, 0
        while not self.dispatcher.done:
            for given in self.timed(self.dispatcher.assign, self.now_s):
                self.figures.copies += given.copy
                took_s = self.slow[given.worker] * self.random.lognormvariate(3, 0.3)
                event = (self.now_s + took_s, next(self.ties), given.worker, given.shard.shard_id)
                heapq.heappush(self.events, event)
            if self.events:
                self.turn()
            else:
                self.now_s += 1
            if self.figures.done >= next_sample:
                next_sample += sample_every
                self.figures.rss_mib.append((self.figures.done, round(rss_mib(), 1)))
                spent = self.figures.seconds - before_s
                if spent:
                    rate = (self.figures.done - before_n) / spent
                    self.figures.rate.append((self.figures.done, round(rate)))
                before_s, before_n = self.figures.seconds, self.figures.done
        self.figures.rss_mib.append((self.figures.done, round(rss_mib(), 1)))
        return self.finished()

    def turn(self) -> None:
        """What ended within 0.2 s: the driver's loop sees that much at once."""
        until_s = self.events[0][0] + 0.2
        while self.events and self.events[0][0] <= until_s:
            self.now_s, _, worker, shard_id = heapq.heappop(self.events)
            if worker in self.slow:  # else it died meanwhile
                self.end(worker, shard_id)

    def end(self, worker: str, shard_id: str) -> None:
        """An attempt ends, one way or another."""
        drawn = self.random.random()
        if drawn < self.kills:
            self.figures.deaths += 1
            del self.slow[worker]
            self.timed(self.dispatcher.worker_lost, worker, reason="killed")
            self.join()
        elif drawn < self.kills + FAILS or int(shard_id, 16) % self.poison == self.poison - 1:
            self.timed(self.dispatcher.failed, worker, shard_id, "it failed")
        elif self.timed(self.dispatcher.completed, worker, shard_id, self.now_s):
            index = int(shard_id, 16)
            assert not self.seen[index], f"{shard_id} twice"
            self.seen[index] = 1
            self.figures.done += 1
        self.dispatcher.take_quarantined()

    def finished(self) -> Figures:
        """Check that all is there, and sum up."""
        found = self.figures
        found.quarantined = len(self.dispatcher.quarantined)
        found.requeued = self.dispatcher.requeued_count
        assert found.done + found.quarantined == found.shards == sum(self.seen) + found.quarantined
        found.shards_per_s = round(found.shards / found.seconds)
        found.seconds = round(found.seconds, 2)
        found.simulated_hours = round(self.now_s / 3600, 1)
        return found


def plot(found: Figures, path: Path) -> None:
    """Memory and pace over the shards done."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, pace) = plt.subplots(2, 1, sharex=True, figsize=(7, 5))
    memory.plot(*zip(*found.rss_mib, strict=True))
    memory.set(ylabel="process, MiB", ylim=(0, None))
    memory.set_title(f"{found.shards:,} shards, {found.workers:,} simulated workers")
    pace.plot(*zip(*found.rate, strict=True))
    pace.set(ylabel="bookkeeping, shards/s", xlabel="shards done", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    simulation = Simulation(given.shards, given.workers, given.seed, rules=DispatchRules(depth=3))
    found = simulation.run(sample_every=max(1, given.shards // 50))
    if given.json:
        given.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    if given.plot:
        plot(found, given.plot)
    memory = [mib for _, mib in found.rss_mib]
    print(
        f"{found.done:,} done, {found.quarantined} quarantined, {found.requeued:,} requeued, "
        f"{found.deaths} workers died, {found.copies} copies\n"
        f"{found.shards_per_s:,} shards/s inside the Dispatcher ({found.seconds} s)\n"
        f"{memory[0]:.0f} MiB at the start, {max(memory):.0f} MiB at most"
    )


if __name__ == "__main__":
    main()

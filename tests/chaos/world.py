"""Where chaos happens: a real Ray, a real S3 server behind a faulty proxy, a small real run.

Ray, the server and the workers are those of the whole campaign (a worker takes seconds of CPU time
to load), and a worker that is killed is replaced, as in any run. The run itself is new for every
schedule, at the same URL: what it left is checked, and then removed.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from pipelines.cluster.nodes import cluster_nodes
from pipelines.cluster.sizing import size_pool
from pipelines.config.run_config import RunConfig
from pipelines.demo.digits import make_pages
from pipelines.labelling.open_run import open_run
from pipelines.labelling.run import open_pool
from storage.objects.protocols import ObjectStore
from storage.records import AnnotationRow, Shard
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.chaos.schedule import Blow
from tests.support.patience import patient
from tests.support.samples.tar_samples import tar_of
from tests.support.samples.tiny_run import run_config
from tests.support.servers.proxy import FaultyProxy, faulty_proxy
from tests.support.servers.s3 import S3Server
from workers.actors.events import Event, ShardDone, ShardError, WorkerGone, WorkerReady
from workers.actors.pool import LabelPool

SHARDS, PAGES = 8, 40
_PAUSE_S = 3.0
_QUIET_S = 120.0


class LastingPool:
    """One LabelPool for many drivers, each of which is told anew who is ready.

    A driver that dies leaves its shards with the workers, which go on with them: so they do when
    a driver is killed whose cluster lives on.
    """

    def __init__(self, pool: LabelPool) -> None:
        self._pool = pool
        self._first: list[Event] = []
        self.ready: dict[str, WorkerReady] = {}
        self._held: set[tuple[str, str]] = set()

    def again(self) -> LastingPool:
        """For the next driver."""
        self._hear(0)
        self._first = list(self.ready.values())
        return self

    @property
    def alive(self) -> int:
        return self._pool.alive

    def submit(self, worker: str, shard: Shard, attempt: str) -> None:
        self._held.add((worker, shard.shard_id))
        self._pool.submit(worker, shard, attempt)

    def events(self, timeout_s: float) -> list[Event]:
        first, self._first = self._first, []
        return first + self._hear(0 if first else timeout_s)

    def replace(self, worker: str, reason: str) -> None:
        self._pool.replace(worker, reason)

    def drain(self, worker: str, reason: str, within_s: float | None) -> None:
        self._pool.drain(worker, reason, within_s)

    def places(self) -> dict[str, str]:
        return self._pool.places()

    def resize(self, count: int) -> None:
        self._pool.resize(count)

    def settle(self) -> None:
        """Wait until no worker has anything to do any more."""
        limit = time.monotonic() + patient(_QUIET_S)
        while self._held:
            assert time.monotonic() < limit, f"workers do not end: {self._held}"
            self._hear(0.2)

    def wait_for_workers(self, count: int) -> None:
        """Wait until that many are ready."""
        limit = time.monotonic() + 4 * _QUIET_S
        while len(self.ready) < count:
            assert time.monotonic() < limit, "workers do not start"
            self._hear(0.2)

    def _hear(self, timeout_s: float) -> list[Event]:
        events = self._pool.events(timeout_s)
        for event in events:
            if isinstance(event, WorkerReady):
                self.ready[event.worker] = event
            elif isinstance(event, WorkerGone):
                self.ready.pop(event.worker, None)
                self._held = {held for held in self._held if held[0] != event.worker}
            elif isinstance(event, ShardDone | ShardError):
                self._held.discard((event.worker, event.shard_id))
        return events


class World:
    """Everything that outlasts a schedule. Made by ``world``."""

    def __init__(self, server: S3Server, proxy: FaultyProxy, folder: Path, checkpoint: Path):
        self.proxy = proxy
        self.bucket = server.fresh_bucket()
        self.options = server.options
        self.images = self._fill(folder)
        self.config: RunConfig = run_config(
            f"s3://{self.bucket}/pages", f"s3://{self.bucket}/run", checkpoint,
            model={"image_size": 320},
            workers={"count": 2, "cpus": 0.5, "hang_after_s": 8, "depth": 2, "batch_size": 4},
            storage={
                "endpoint_url": proxy.endpoint_url, "region": "us-east-1", "attempts": 3,
                "connect_timeout_s": 2, "read_timeout_s": 2,
            },
        )  # fmt: skip
        self.pool: LastingPool  # once it is open
        self.reference: dict[str, AnnotationRow] = {}

    def _fill(self, folder: Path) -> set[str]:
        """The source: pages with odd and broken files among them, in tars."""
        made = make_pages(folder, images=PAGES, seed=7)
        pages = [(path.name, path.read_bytes()) for path in sorted(made.images.iterdir())]
        source = open_store(f"s3://{self.bucket}/pages", self.options)
        ids = set()
        for i in range(SHARDS):
            source.put(f"pages-{i:03d}.tar", tar_of(*pages[i::SHARDS]))
            ids |= {f"pages-{i:03d}.tar/{name}" for name, _ in pages[i::SHARDS]}
        return ids

    @cached_property
    def store(self) -> ObjectStore:
        """The run's output, past the proxy."""
        return open_store(f"s3://{self.bucket}/run", self.options)

    def manifest(self) -> Manifest:
        """The run, past the proxy."""
        return Manifest.open(self.store.url, self.options)

    def rows(self, manifest: Manifest) -> dict[str, AnnotationRow]:
        """Live rows by image id. Raises AssertionError where one is there twice."""
        rows = list(live_rows(manifest))
        twice = [key for key, n in Counter(row.image_id for row in rows).items() if n > 1]
        assert not twice, f"twice: {twice}"
        return {row.image_id: row for row in rows}

    def clear(self) -> None:
        """Remove the run."""
        store = self.store
        keys = [found.key for found in store.list()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(store.delete, keys))

    def quiet(self) -> None:
        """Wait until nothing of this run is on its way any more."""
        self.pool.settle()
        limit = time.monotonic() + patient(_QUIET_S)
        while self.proxy.late:
            assert time.monotonic() < limit
            time.sleep(0.05)

    def strike(self, blow: Blow, who: int) -> bool:
        """Hit a worker's process; False where there is none."""
        pids = [ready.facts.pid for ready in list(self.pool.ready.values())]
        if not pids:
            return False
        pid = pids[who % len(pids)]
        try:
            _hit(pid, blow)
        except (ProcessLookupError, FileNotFoundError):
            return False
        return True


def _hit(pid: int, blow: Blow) -> None:
    if blow == "pause":
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(_PAUSE_S, _resume, [pid])
        timer.daemon = True
        timer.start()
    elif blow == "no memory":
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 20)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    else:
        os.kill(pid, signal.Signals[blow])


def _resume(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextmanager
def world(server: S3Server, folder: Path, checkpoint: Path) -> Iterator[World]:
    """A world with two workers ready. Ray runs already, with the server's credentials."""
    with faulty_proxy(server.endpoint_url) as proxy:
        proxy.remembers = lambda path: "list-type=2" in path
        made = World(server, proxy, folder, checkpoint)
        run = open_run(made.config, cuda=False)
        sizing = size_pool(made.config.workers, cluster_nodes(), cuda=False)
        with open_pool(made.config, run, sizing) as pool:
            pool.resize(min(sizing.count, SHARDS))
            pool.start()
            made.pool = LastingPool(pool)
            made.pool.wait_for_workers(2)
            yield made

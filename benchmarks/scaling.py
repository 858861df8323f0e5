"""Images/s of 1, 2, 4, … actors on declared GPUs, against one actor: what the driver costs.

    python -m benchmarks.scaling [--actors 1,2,4,16,64] [--image-ms 250]

A real Ray on this machine is told of as many GPUs as there are actors; driver, dispatcher, pool,
actors, worker pipelines, ledger and commits are the product's own. The model alone is made up: it
takes a fixed time an image and no core, as a GPU would (see actors.py). Timed from when all
actors are ready to the last commit, with the tail in it. Every actor needs about 150 MB.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.actors import Sleeping, actor_around
from benchmarks.detectors import FreeDetector
from benchmarks.photos import photo_bytes, scratch, write_tars
from benchmarks.rounds import Report, Rounds, parser, plain
from benchmarks.worker import identity_of
from pipelines.cluster.local_ray import loopback_only
from pipelines.dispatch.dispatcher import Dispatcher, DispatchRules
from pipelines.dispatch.drive import Drive, Journal
from pipelines.dispatch.tally import Caller
from storage.objects.protocols import StorageOptions
from storage.records import Shard
from storage.runs.ledger import LedgerWriter
from storage.runs.manifest import Manifest, RunRecord
from storage.shards.selecting import tar_shards
from storage.stores.open import open_store
from workers.actors.actor import LabelActor
from workers.actors.events import Event, WorkerReady
from workers.actors.pool import LabelPool, PoolSize
from workers.spec import LabellerOptions, WorkerSpec

DEPTH = 3
PER_SHARD = 8
BATCH = 4


class GatheredPool(LabelPool):
    """Tells of its workers only once all of them are ready; ``began_s`` is that moment."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._held: list[Event] = []
        self.began_s: float | None = None
        self.wanted = args[1].count

    def events(self, timeout_s: float) -> list[Event]:
        """See ``LabelPool.events``."""
        came = super().events(timeout_s)
        if self.began_s is not None:
            return came
        self._held += came
        if sum(isinstance(event, WorkerReady) for event in self._held) < self.wanted:
            return []
        self.began_s = time.perf_counter()
        held, self._held = self._held, []
        return held


def main() -> None:
    made = parser(__doc__, images=40, rounds=1)
    made.add_argument("--actors", default="1,2,4,16")
    made.add_argument("--image-ms", type=float, default=250.0, help="what the model takes an image")
    options = made.parse_args()
    counts = [int(text) for text in options.actors.split(",")]
    photos = photo_bytes(options.photos, 32)
    report = Report("scaling", "images/s", plain(options))
    with scratch() as name:
        folder = Path(name)
        start_ray(cpus=max(2, *counts), gpus=max(counts))
        sides = {
            f"{count} actors": lambda c=count: run(
                c, options.images, options.image_ms / 1e3, photos, folder
            )
            for count in counts
        }
        rounds = Rounds()
        rounds.run(sides, options.rounds)
    report.values = rounds.values
    for count in counts:
        ideal = count * 1e3 / options.image_ms
        found = rounds.per_round(lambda row, c=count, i=ideal: row[f"{c} actors"] / i)  # type: ignore[misc]
        report.add(f"{count} actors ÷ {count} × the model alone", found)
    report.write(options.out)


def run(actors: int, images: int, image_s: float, photos: list[bytes], folder: Path) -> float:
    """Return images/s of one whole run on that many actors, ``images`` for each of them."""
    source, output = folder / f"in-{actors}", folder / f"out-{secrets.token_hex(4)}"
    if not source.exists():
        wanted = images * actors
        write_tars(source, (photos * (wanted // len(photos) + 1))[:wanted], PER_SHARD)
    record = RunRecord(identity_of(FreeDetector().classes), {}, {}, "2026-01-01T00:00:00+00:00")
    manifest = Manifest.create_or_continue(open_store(str(output)), record)
    shards = list(tar_shards(open_store(str(source)).list()))
    options = LabellerOptions(decode_threads=1, batch_size=BATCH)
    spec = spec_of(str(source), str(output), options)
    return through_pool(
        manifest, spec, PoolSize(actors, 1.0, 1.0), actor_around(lambda: Sleeping(image_s)), shards
    )


def through_pool(
    manifest: Manifest,
    spec: WorkerSpec,
    size: PoolSize,
    actor: type[LabelActor],
    shards: list[Shard],
) -> float:
    """Return images/s of a run whose actors are of that class."""
    pool = GatheredPool(spec, size, depth=DEPTH, hang_after_s=600, actor=actor)
    pool.start()
    try:
        return drive(manifest, pool, shards)
    finally:
        pool.close()


def drive(manifest: Manifest, pool: GatheredPool, shards: list[Shard]) -> float:
    """Return the product's loop; images/s since all actors were ready."""
    invocation = "benchmark"
    ledger = LedgerWriter(manifest.store, invocation)
    dispatcher = Dispatcher(iter(shards), DispatchRules(attempts=3, depth=DEPTH))
    loop = Drive(Journal(manifest, ledger, invocation), dispatcher, pool, Caller())
    loop.run()
    assert pool.began_s is not None
    return loop.tally.images / (time.perf_counter() - pool.began_s)


def spec_of(source: str, output: str, options: LabellerOptions, *, threads: int = 1) -> WorkerSpec:
    """Return what the actors are told; the model in it is never loaded."""
    model: Any = None
    return WorkerSpec(model, source, output, StorageOptions(), options, torch_threads=threads)


def start_ray(*, cpus: int, gpus: int = 0, object_store_mb: int = 80) -> None:
    """A private Ray on loopback that believes in GPUs; ends with this process."""
    import ray

    root = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.getenv("PYTHONPATH")])])
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    with loopback_only():
        ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False,
            object_store_memory=object_store_mb * 1024 * 1024, log_to_driver=False,
            logging_level=logging.ERROR, configure_logging=False,
            _temp_dir=tempfile.mkdtemp(prefix="lf-", dir="/tmp"),
        )  # fmt: skip


if __name__ == "__main__":
    main()

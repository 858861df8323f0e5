"""The labelling run: from a config to committed Parquet. This page is the whole of it."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

import httpx

from pipelines.cluster.elastic import elastic
from pipelines.cluster.ray_cluster import check_shared_folders, cluster_nodes, ray_cluster
from pipelines.cluster.sizing import Node, Sizing, size_pool, wanted_actors, wants_gpu
from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_places, listed_objects
from pipelines.dispatch.dispatcher import Dispatcher, DispatchRules
from pipelines.dispatch.drive import Drive, Outcome
from pipelines.dispatch.limits import Limits
from pipelines.dispatch.metrics import Measured, RayMetrics, count_review_queue
from pipelines.dispatch.progress import watching
from pipelines.dispatch.stopping import stopping_on_signals
from pipelines.dispatch.tally import Tally, Watcher
from pipelines.labelling.open_run import OpenRun, open_run, refresh_listing
from pipelines.labelling.planned_review import PlannedReview
from pipelines.runs.status import RunStatus, run_status
from storage.errors import Interrupted, LabelfleetError, StorageError
from storage.logs import about, log_format
from storage.objects.protocols import normalise_url, open_store
from storage.records import Shard
from storage.runs.ledger import LedgerEntry, LedgerWriter, new_invocation
from storage.runs.listing import Listing
from storage.runs.lock import RunLock, run_lock
from storage.runs.manifest import Manifest
from workers.actors.pool import LabelPool, PoolSize
from workers.spec import LabellerOptions, WorkerSpec

log = logging.getLogger("labelfleet")


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run stands after one invocation; counts are the whole run's unless said otherwise.

    Attributes:
        images, ok, undecodable, too_large, unsupported, missing: rows, all and by status.
        detections: boxes above the score floor.
        shards: committed. ``left``: listed and not yet committed. ``quarantined``: set aside.
        seconds, images_per_s, new_images, new_shards: of this invocation, start-up included.
        routed: images drawn for people to see, in this invocation.
        truncated: tars that ended in the middle, with what was said.
        outcome: ``done``, or ``stopped`` on request with work left.
    """

    images: int
    ok: int
    undecodable: int
    too_large: int
    unsupported: int
    missing: int
    detections: int
    shards: int
    left: int
    quarantined: int
    new_images: int
    new_shards: int
    seconds: float
    images_per_s: float
    output: str
    outcome: Outcome
    exit_code: int
    routed: int = 0
    truncated: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def label_run(
    config: RunConfig, *, address: str | None = None, limit: int | None = None
) -> RunSummary:
    """Label everything of the source that is not labelled yet.

    Args:
        config: the run.
        address: a Ray cluster's address; None: RAY_ADDRESS, else a local Ray.
        limit: at most this many shards in this invocation.

    Raises:
        LabelfleetError: the run could not start or go on; what is committed stays, and the same
            call continues it.
    """
    began_s = time.monotonic()
    check_places(config)
    review = PlannedReview.of(config)
    next(listed_objects(config))  # a missing source shows before Ray takes seconds to start
    output = open_store(config.output, config.storage.options())
    with run_lock(output, f"labelfleet run {config.name}") as lock:
        with ray_cluster(address):
            check_shared_folders(normalise_url(config.source.url), output.url)
            nodes = cluster_nodes()
            run = open_run(config, cuda=wants_gpu(config.workers, nodes))
            tally, outcome = label_what_is_left(config, run, nodes, limit, lock)
        # From here on no GPU is held.
        release_quarantine(run.manifest)
        routed = review.route(run.manifest, tally.shards)
        status = run_status(run.manifest)
        summary = summarise(status, tally, outcome, began_s, config, routed)
    notify(config, summary)
    return summary


def label_what_is_left(
    config: RunConfig, run: OpenRun, nodes: Sequence[Node], limit: int | None, lock: RunLock
) -> tuple[Tally, Outcome]:
    """List, and label what has no commit yet.

    Workers load while the listing goes on, as many as shards were found by then, unless the run has
    a ``max_cost``; none is started when nothing is left.
    """
    with ExitStack() as stack:

        @cache
        def pool() -> tuple[LabelPool, Sizing]:
            sizing = size_pool(config.workers, nodes, cuda=run.model.device == "cuda")
            return stack.enter_context(open_pool(config, run, sizing)), sizing

        def found(shards: int) -> None:
            actors, sizing = pool()
            if actors.count < min(sizing.count, shards):
                actors.resize(min(sizing.count, shards))
                actors.start()

        work = find_work(run, config, limit, found)
        if not work.total:
            return Tally(), "done"
        found(work.total)
        actors, sizing = pool()
        actors.resize(min(sizing.count, work.total))
        return drive(config, run, actors, sizing, work, lock.check)


@dataclass(frozen=True, slots=True)
class Work:
    """What is left: shards, lazily; how many; and which of them are out of quarantine."""

    shards: Iterator[Shard]
    total: int
    last_chance: frozenset[str]


def find_work(
    run: OpenRun,
    config: RunConfig,
    limit: int | None,
    found: Callable[[int], None] = lambda shards: None,
) -> Work:
    """List the source again; live shards minus committed ones, quarantined ones last.

    Args:
        limit: at most so many shards.
        found: told how many shards are left by what is known: of earlier listings at first, then
            more and more, while the listing goes on. Not where ``max_cost`` is set: workers that
            wait for a listing are paid for, and it could not count them.
    """
    early = config.max_cost is None
    committed = run.manifest.committed()
    at_most = math.inf if limit is None else limit
    earlier = Listing(run.manifest.store)
    left = sum(shard_id not in committed for shard_id in earlier.live_ids())
    if left and early:
        found(int(min(left, at_most)))

    def another(shard: Shard) -> None:
        nonlocal left
        left += shard.shard_id not in committed
        if early and 0 < left <= at_most:
            found(left)

    listing, change = refresh_listing(run, config, another)
    log.info("listing %d: %d new shards", change.generation, change.shards_added)
    held_back = frozenset(run.manifest.quarantined_ids())
    left = sum(shard_id not in committed for shard_id in listing.live_ids())
    shards = shards_to_do(listing, committed, held_back)
    total = left if limit is None else min(left, limit)
    return Work(itertools.islice(shards, total), total, held_back)


def shards_to_do(
    listing: Listing, committed: set[str], held_back: frozenset[str]
) -> Iterator[Shard]:
    """Live shards that are not committed; those in quarantine come last."""
    for quarantined in (False, True):
        for shard in listing.live_shards(skip=committed) if held_back or not quarantined else ():
            if (shard.shard_id in held_back) == quarantined:
                yield shard


@contextmanager
def open_pool(config: RunConfig, run: OpenRun, sizing: Sizing) -> Iterator[LabelPool]:
    """A pool without any actor yet; those that it gets are killed at the end."""
    options = LabellerOptions(
        decode_threads=sizing.decode_threads,
        nms_threads=sizing.nms_threads,
        batch_size=sizing.batch_size,
        batch_size_max=sizing.batch_size_max,
        max_pixels=config.max_pixels,
        max_image_bytes=config.max_image_bytes,
    )
    spec = WorkerSpec(
        model=run.model,
        source_url=run.source.url,
        output_url=run.manifest.url,
        storage=config.storage.options(),
        options=options,
        torch_threads=sizing.torch_threads,
        run=config.name,
        log_format=log_format(),
    )
    pool = LabelPool(
        spec,
        PoolSize(0, sizing.gpus, sizing.cpus),
        depth=config.workers.depth,
        hang_after_s=config.workers.hang_after_s,
    )
    try:
        yield pool
    finally:
        pool.close()


def drive(
    config: RunConfig,
    run: OpenRun,
    pool: LabelPool,
    sizing: Sizing,
    work: Work,
    guard: Callable[[], None],
) -> tuple[Tally, Outcome]:
    """Run the loop with its ledger, its progress display and its signal handlers."""
    invocation = new_invocation()
    ledger = LedgerWriter(run.manifest.store, invocation)
    rules = DispatchRules(attempts=config.attempts, depth=config.workers.depth)
    dispatcher = Dispatcher(work.shards, rules, last_chance=work.last_chance)
    workers = min(sizing.count, work.total)
    note = {
        "workers": workers,
        "gpus": workers * sizing.gpus,
        "decoders": sizing.decode_threads,
        "nms_threads": sizing.nms_threads,
        "shards": work.total,
    }
    _tell(ledger, "start", note)  # at once: `status` on another machine sees it
    ended = "failed"
    wanted = partial(wanted_actors, config.workers, sizing)
    with (
        about(run=config.name, invocation=invocation),
        stopping_on_signals() as stopper,
        watching(work.total) as display,
        elastic(pool, wanted, work.total) as cluster,
    ):
        try:
            watcher = measured(display, run.manifest, work.total)
            loop = Drive(
                run.manifest, ledger, dispatcher, pool, watcher, stopper, invocation=invocation,
                limits=limits(config, sizing), guard=guard, cluster=cluster,
            )  # fmt: skip
            outcome = loop.run()
            ended = "quarantined" if loop.tally.quarantined else outcome
        except KeyboardInterrupt:
            ended = "interrupted"
            raise Interrupted(
                f"stopped at once ({stopper.reason})",
                hint="what is committed stays; run the same command to continue",
            ) from None
        finally:
            _tell(ledger, "end", {"outcome": ended})
    return loop.tally, outcome


def measured(display: Watcher, manifest: Manifest, shards: int) -> Measured:
    """The display, and Prometheus beside it; a queue that cannot be read ends no labelling."""
    try:
        queued = count_review_queue(manifest.store)
    except LabelfleetError as exc:
        display.note(f"the review queue could not be counted: {exc.message}")
        queued = 0
    sink = RayMetrics(manifest.record.identity.name)
    return Measured(display, sink, total_shards=shards, review_queue=queued)


def _tell(ledger: LedgerWriter, event: str, note: dict[str, Any]) -> None:
    """The ledger is a cache: that it cannot be written must not hide why the run ended."""
    try:
        ledger.write(LedgerEntry(event=event, at=time.time(), note=note))
        ledger.flush()
    except StorageError as exc:
        log.warning("the ledger's %s could not be written: %s", event, exc.message)


def limits(config: RunConfig, sizing: Sizing) -> Limits:
    """What this invocation may take: max_hours, and max_cost as seconds of one worker."""
    per_hour = (config.price_per_gpu_hour or 0) * sizing.gpus
    paid = config.max_cost is not None and per_hour > 0
    return Limits(
        seconds=None if config.max_hours is None else config.max_hours * 3600,
        worker_seconds=config.max_cost / per_hour * 3600 if paid and config.max_cost else None,
        start_after_s=config.workers.start_after_s,
    )


def release_quarantine(manifest: Manifest) -> None:
    """Remove the records of shards that were labelled after all."""
    held_back = manifest.quarantined_ids()
    for shard_id in held_back & manifest.committed() if held_back else ():
        manifest.release(shard_id)


def summarise(
    status: RunStatus,
    tally: Tally,
    outcome: Outcome,
    began_s: float,
    config: RunConfig,
    routed: int = 0,
) -> RunSummary:
    """The run as it stands, with what this invocation added."""
    seconds = time.monotonic() - began_s
    counts, images = status.images, sum(status.images.values())
    too_bad = images - counts["ok"] > config.max_bad_share * images
    failed = 3 if status.quarantined or too_bad else 0
    return RunSummary(
        images=images,
        ok=counts["ok"],
        undecodable=counts["undecodable"],
        too_large=counts["too_large"],
        unsupported=counts["unsupported"],
        missing=counts["missing"],
        detections=status.detections,
        shards=status.committed,
        left=status.left,
        quarantined=status.quarantined,
        new_images=tally.images,
        new_shards=tally.shards,
        seconds=round(seconds, 2),
        images_per_s=round(tally.images / seconds, 2),
        output=normalise_url(config.output),
        outcome=outcome,
        exit_code=130 if outcome == "stopped" else failed,
        routed=routed,
        truncated=tally.truncated,
    )


def notify(config: RunConfig, summary: RunSummary) -> None:
    """Tell the webhook, if there is one; that it does not answer is no reason to fail."""
    if config.notify is None:
        return
    try:
        httpx.post(
            config.notify.get_secret_value(), json=summary.to_json(), timeout=10
        ).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
        log.warning("notify: the webhook failed: %s", type(exc).__name__)

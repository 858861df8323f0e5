"""Entry point of the labelling run: from a config to committed Parquet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from pipelines.cluster.elastic import elastic
from pipelines.cluster.nodes import cluster_nodes
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.cluster.shared_folders import check_shared_folders
from pipelines.cluster.sizing import Node, Sizing, size_pool, wanted_actors, wants_gpu
from pipelines.config.files import check_files
from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_places, listed_objects
from pipelines.dispatch.dispatcher import Dispatcher, DispatchRules
from pipelines.dispatch.drive import Drive, Journal, Outcome, Terms
from pipelines.dispatch.limits import Limits
from pipelines.dispatch.metrics import Measured, RayMetrics, Sink, count_review_queue
from pipelines.dispatch.tally import Caller, Tally, Watcher
from pipelines.evaluation.watch import watch_run
from pipelines.labelling.exit_codes import exit_code
from pipelines.labelling.open_run import OpenRun, open_run
from pipelines.labelling.planned_review import PlannedReview
from pipelines.labelling.summary import RunSummary, notify, summarise
from pipelines.labelling.work import Work, find_work
from pipelines.models.requested import check_device, existing_record, model_request
from pipelines.runs.drift_record import known_drift
from pipelines.runs.status import run_status
from storage.errors import Interrupted, LabelfleetError, StorageError
from storage.logs import about, log_format
from storage.objects.protocols import ObjectStore
from storage.runs.ledger import LedgerEntry, LedgerWriter, new_invocation
from storage.runs.lock import run_lock
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from storage.urls import normalise_url
from workers.actors.pool import LabelPool, PoolSize
from workers.models.resolve import remarks_on
from workers.spec import LabellerOptions, WorkerSpec

log = logging.getLogger("labelfleet")

STALL_S = 900.0  # a turn of the loop takes a fraction of a second; with storage down, minutes


def label_run(
    config: RunConfig,
    *,
    address: str | None = None,
    limit: int | None = None,
    strict: bool = False,
    caller: Caller | None = None,
) -> RunSummary:
    """Label everything of the source that is not labelled yet.

    Install no signal handler and print nothing; ``caller`` is the way to follow and to stop a run.

    Args:
        config: the run.
        address: a Ray cluster's address; None: RAY_ADDRESS, else a local Ray.
        limit: at most this many shards in this invocation.
        strict: how the summary's exit code counts what was left, see ``exit_codes``.
        caller: follows the run and may stop it; None: notes go to the log.

    Raises:
        LabelfleetError: the run could not start or go on; what is committed stays, and the same
            call continues it.
    """
    began_s, caller = time.monotonic(), caller or Caller()
    check_places(config)
    check_files(config)
    review = PlannedReview.of(config)
    next(listed_objects(config))  # fail on a missing source before paying for Ray's start
    output = open_store(config.output, config.storage.options())
    if existing_record(output) is None:
        remarks_on(model_request(config), config.storage.options())  # fail on it before Ray, too
    # Ray ends after the lock is released: an end that takes long must not hold up the next run.
    with ExitStack() as at_the_end, run_lock(output, f"labelfleet run {config.name}") as lock:

        @cache
        def nodes() -> Sequence[Node]:
            at_the_end.enter_context(ray_cluster(address))
            check_shared_folders(normalise_url(config.source.url), output.url)
            return cluster_nodes()

        run = open_run(config, cuda=_on_gpus(config, output, nodes), note=caller.watcher.note)
        side = Side(caller, lock.check, partial(lock.needing_progress, STALL_S), began_s)
        tally, outcome = label_what_is_left(config, run, nodes, limit, side)
        # From here on no GPU is held.
        release_quarantine(run.manifest)
        routed = review.route(run.manifest, tally.shards)
        sink = RayMetrics(config.name) if tally.shards else None  # without work, Ray is not there
        drift = watched(run.manifest, tally, caller.watcher, sink)
        status = run_status(run.manifest)
        summary = summarise(status, tally, outcome, began_s, config, routed)
    summary = replace(summary, drift=drift, exit_code=exit_code(summary, strict=strict))
    notify(config, summary)
    return summary


def _on_gpus(config: RunConfig, output: ObjectStore, nodes: Callable[[], Sequence[Node]]) -> bool:
    """Return whether the run labels on GPUs; an existing one has settled that, without Ray."""
    existing = existing_record(output)
    if existing is not None and "device" in existing.inference:
        return bool(existing.inference["device"] == "cuda")
    return wants_gpu(config.workers, nodes())


def watched(manifest: Manifest, tally: Tally, watcher: Watcher, sink: Sink | None = None) -> str:
    """Describe how recently added images differ from the first ones; '' where they do not.

    A failure of this comparison does not fail the run. ``sink`` is told of an alarm, or its end.
    """
    if not tally.shards:
        return ""
    try:
        found = watch_run(manifest)
    except LabelfleetError as exc:
        watcher.note(f"the run could not be compared with itself: {exc.message}")
        return ""
    except Exception as exc:  # a border: the labels are committed, whatever the comparison hits
        log.exception("the run could not be compared with itself")
        watcher.note(f"the run could not be compared with itself: {type(exc).__name__}: {exc}")
        return ""
    if found is None:
        return ""
    if sink is not None:
        sink.set("labelfleet_drift", float(found.alarmed))
    return found.alarm if found.alarmed else ""


@dataclass(frozen=True, slots=True)
class Side:
    """What the loop is given: its caller, and the lock.

    Attributes:
        guard: raises when the lock is not held any more; called every turn of the loop.
        turning: entered while the loop turns; the lock is then renewed only while ``guard`` is
            called, so that a loop that hangs gives the run to the next one.
        began_s: when the command began, on the monotonic clock.
    """

    caller: Caller
    guard: Callable[[], None]
    turning: Callable[[], AbstractContextManager[None]] = nullcontext
    began_s: float = field(default_factory=time.monotonic)


def label_what_is_left(
    config: RunConfig,
    run: OpenRun,
    nodes: Callable[[], Sequence[Node]],
    limit: int | None,
    side: Side,
) -> tuple[Tally, Outcome]:
    """List the source, and label what has no commit yet.

    Workers load while the listing goes on, at most one for each shard found so far, unless the run
    has a ``max_cost``. When nothing is left, ``nodes``, which starts Ray, is not called.
    """
    with ExitStack() as stack:

        @cache
        def pool() -> tuple[LabelPool, Sizing]:
            cuda = run.model.device == "cuda"
            check_device(cuda=cuda, there=wants_gpu(config.workers, nodes()))
            sizing = size_pool(config.workers, nodes(), cuda=cuda)
            return stack.enter_context(open_pool(config, run, sizing)), sizing

        def found(shards: int) -> None:
            actors, sizing = pool()
            if actors.count < min(sizing.count, shards):
                actors.resize(min(sizing.count, shards))
                actors.start()

        work = find_work(run, config, limit, found, side.guard)
        if not work.total:
            return Tally(), "done"
        found(work.total)
        actors, sizing = pool()
        actors.resize(min(sizing.count, work.total))
        with side.turning():
            return drive(config, run, actors, sizing, work, side)


@contextmanager
def open_pool(config: RunConfig, run: OpenRun, sizing: Sizing) -> Iterator[LabelPool]:
    """Yield a pool without actors yet; kill those that it gets at the end."""
    options = LabellerOptions(
        decode_threads=sizing.decode_threads,
        nms_threads=sizing.nms_threads,
        batch_size=sizing.batch_size,
        batch_size_max=sizing.batch_size_max,
        max_pixels=config.max_pixels,
        max_image_bytes=config.max_image_bytes,
        max_frames=config.source.max_frames if config.source.frames == "all" else None,
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
    config: RunConfig, run: OpenRun, pool: LabelPool, sizing: Sizing, work: Work, side: Side
) -> tuple[Tally, Outcome]:
    """Run the loop, with its ledger around it and the cluster followed beside it."""
    journal = Journal(run.manifest, *_ledger(run.manifest))
    rules = DispatchRules(attempts=config.attempts, depth=config.workers.depth)
    dispatcher = Dispatcher(work.shards, rules, last_chance=work.last_chance)
    watcher = measured(side.caller.watcher, run.manifest, work.total)
    caller = Caller(watcher, side.caller.stopper)
    terms = Terms(limits(config, sizing), side.guard)
    wanted = partial(wanted_actors, config.workers, sizing)
    # At once: `status` elsewhere sees it.
    _tell(journal.ledger, "start", _pool_facts(sizing, work, side))
    ended = "failed"
    with (
        about(run=config.name, invocation=journal.invocation),
        elastic(pool, wanted, work.total) as cluster,
    ):
        try:
            loop = Drive(journal, dispatcher, pool, caller, terms=terms, cluster=cluster)
            outcome = loop.run(work.total)
            ended = "quarantined" if loop.tally.quarantined else outcome
        except KeyboardInterrupt:
            ended = "interrupted"
            raise Interrupted(
                f"stopped at once ({caller.stopper.reason})",
                hint="what is committed stays; run the same command to continue",
            ) from None
        finally:
            _tell(journal.ledger, "end", {"outcome": ended})
    return loop.tally, outcome


def _ledger(manifest: Manifest) -> tuple[LedgerWriter, str]:
    invocation = new_invocation()
    return LedgerWriter(manifest.store, invocation), invocation


def _pool_facts(sizing: Sizing, work: Work, side: Side) -> dict[str, Any]:
    workers = min(sizing.count, work.total)
    return {
        "workers": workers,
        "gpus": workers * sizing.gpus,
        "decoders": sizing.decode_threads,
        "nms_threads": sizing.nms_threads,
        "shards": work.total,
        "before_s": round(time.monotonic() - side.began_s, 3),  # listing, and Ray's start
    }


def measured(watcher: Watcher, manifest: Manifest, shards: int) -> Measured:
    """Tell Prometheus too; a review queue that cannot be counted does not end the labelling."""
    try:
        queued = count_review_queue(manifest.store)
    except LabelfleetError as exc:
        watcher.note(f"the review queue could not be counted: {exc.message}")
        queued = 0
    sink = RayMetrics(manifest.record.identity.name)
    drift = known_drift(manifest.store)
    drifted = drift is not None and drift.alarmed
    return Measured(watcher, sink, total_shards=shards, review_queue=queued, drift=drifted)


def _tell(ledger: LedgerWriter, event: str, note: dict[str, Any]) -> None:
    """Write to the ledger: a cache, whose failure must not hide why the run ended."""
    try:
        ledger.write(LedgerEntry(event=event, at=time.time(), note=note))
        ledger.flush()
    except StorageError as exc:
        log.warning("the ledger's %s could not be written: %s", event, exc.message)


def limits(config: RunConfig, sizing: Sizing) -> Limits:
    """Translate max_hours and max_cost into seconds, and seconds of one worker."""
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

"""ShardLabeller: shard in, committed rows out, through persistent threads. Plain Python, no Ray.

    label(shard) ─> fetch ─> decode × n ─> infer ─> write ─> one conditional put

The threads live as long as the labeller, so batches cross shard borders and no shard waits for
the one before it. Bytes between the stages are bounded by one budget. Every image that a shard
yields becomes a row; an error that is a shard's own ends that shard's attempt and no other.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from storage.annotations import RowWriter, RunIdentity, ShardFooter
from storage.errors import (
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    ShardFailed,
    SourceTruncated,
    StorageError,
    StorageFull,
    WorkerDiskFull,
    WorkerLost,
)
from storage.manifest import Commit
from storage.os_errors import from_os_error
from storage.records import AnnotationRow, Detections, ImageRecord, Shard, printable
from workers.detector import Detector
from workers.prepare import Prepared, Skipped, prepare
from workers.spec import LabellerOptions

STAGES = ("fetch", "decode", "infer", "write")

_SPOOL = "labelfleet-spool-"
_SPOOL_KEPT_S = 3600.0
_COUNTED, _ABANDON = -1, -2  # in place of a row's index: the shard's end is known; throw it away


class ReadsShards(Protocol):
    """Where images come from: ``storage.shards.read_shard`` over one store."""

    def __call__(self, shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]: ...


class Commits(Protocol):
    """Where rows go: ``Manifest.commit``."""

    def __call__(self, footer: ShardFooter, spool: Path) -> Commit: ...


@dataclass(slots=True)
class _Job:
    """One attempt at one shard, on its way through the threads."""

    shard: Shard
    attempt: str
    spool: Path
    writer: RowWriter
    ended: threading.Event = field(default_factory=threading.Event)
    error: LabelfleetError | None = None
    truncated: str | None = None
    fetched: int | None = None  # images, once the last one was read
    written: int = 0
    pending: dict[int, AnnotationRow] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def fail(self, error: Exception) -> None:
        """The first error is the one that is told."""
        if not self.ended.is_set():
            if not isinstance(error, LabelfleetError):
                error = ShardFailed(f"{type(error).__name__}: {error}")
            self.error = error
            self.ended.set()


@dataclass(frozen=True, slots=True)
class _Fetched:
    job: _Job
    index: int
    record: ImageRecord
    reserved: int


@dataclass(frozen=True, slots=True)
class _Ready:
    job: _Job
    index: int
    record: ImageRecord
    prepared: Prepared
    reserved: int


def _missing(shard: Shard, error: StorageError) -> ImageRecord:
    return ImageRecord(
        printable(shard.key), None, shard.nbytes, None, "missing", printable(error.message)
    )


def _spool_error(exc: OSError, spool: Path) -> LabelfleetError:
    if isinstance(from_os_error(exc, ""), StorageFull):
        return WorkerDiskFull(
            f"no space left for {spool} on {socket.gethostname()}",
            hint="free some space there, or point TMPDIR at a larger disk; then run again",
        )
    return from_os_error(exc, f"the worker's spool file {spool}")


def _sweep_spools(folder: Path) -> None:
    """Remove what killed workers left: the owner is dead, and nothing was written for an hour."""
    for spool in folder.glob(f"{_SPOOL}*"):
        owner = spool.name.removeprefix(_SPOOL).split("-")[0]
        with suppress(OSError):
            old = time.time() - spool.stat().st_mtime > _SPOOL_KEPT_S
            if old and owner.isdigit() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(spool, ignore_errors=True)


class ByteBudget:
    """Bytes that may wait between the stages; one item larger than all of it may pass alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._freed = threading.Condition()
        self._closed = False

    def reserve(self, nbytes: int) -> None:
        """Wait until there is room."""
        with self._freed:
            self._freed.wait_for(
                lambda: self._closed or self._used == 0 or self._used + nbytes <= self._limit
            )
            self._used += nbytes

    def release(self, nbytes: int) -> None:
        """Give room back."""
        with self._freed:
            self._used -= nbytes
            self._freed.notify_all()

    def close(self) -> None:
        """Let every waiter through: the pipeline is ending."""
        with self._freed:
            self._closed = True
            self._freed.notify_all()


class ShardLabeller:
    """Labels shards one after the other or several at once; ``label`` may be called from threads.

    Args:
        detector: used by one thread only.
        read: yields a shard's images.
        commit: puts a finished spool file where it belongs.
        run: repeated in every annotation object.
        options: sizes of the pipeline.
        spool_dir: local folder for the Parquet being written; None: a temporary one.
    """

    def __init__(
        self,
        detector: Detector,
        read: ReadsShards,
        commit: Commits,
        run: RunIdentity,
        options: LabellerOptions | None = None,
        *,
        spool_dir: Path | None = None,
    ) -> None:
        self._detector, self._read, self._commit, self._run = detector, read, commit, run
        self._options = options or LabellerOptions()
        _sweep_spools(Path(spool_dir or tempfile.gettempdir()))
        prefix = f"{_SPOOL}{os.getpid()}-"
        self._spool = tempfile.TemporaryDirectory(prefix=prefix, dir=spool_dir)
        height, width = detector.preprocessing.size
        self._input_nbytes = height * width * 3
        self._batch_size = self._options.batch_size
        # Room for a batch in the making, one on the device and one behind it, or nothing overlaps.
        batches = 3 * self._batch_size * self._input_nbytes
        self._budget = ByteBudget(max(self._options.queued_bytes, batches))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._fetched: queue.SimpleQueue[_Fetched | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Ready | None] = queue.SimpleQueue()
        self._rows: queue.SimpleQueue[tuple[_Job, int, AnnotationRow | None] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._upstream = 0  # jobs being read plus images on their way to the infer thread
        self._images_done = 0
        self._closed = threading.Event()
        self._broken: WorkerLost | None = None
        self._jobs_by_id: dict[int, _Job] = {}
        loops = [self._fetch_loop, self._infer_loop, self._write_loop]
        loops += [self._decode_loop] * self._options.decode_threads
        # Daemons: a thread that outlived its actor would keep the process, and its GPU, alive.
        self._threads = [threading.Thread(target=self._guard(f), daemon=True) for f in loops]
        for thread in self._threads:
            thread.start()

    @property
    def images_done(self) -> int:
        """Images that became rows so far; what the hang clock watches."""
        return self._images_done

    def label(self, shard: Shard, attempt: str) -> Commit:
        """Label one shard and commit its rows. Blocks; several threads may call it at once.

        Args:
            shard: what to read.
            attempt: unique id of this attempt; stands in the footer.

        Raises:
            WorkerLost: the detector is broken or the labeller was closed; no shard is at fault.
            LabelfleetError: this shard's attempt failed; the class says why (StorageFull,
                AccessDenied, ShardFailed, ...), the message begins with the shard.
        """
        spool = Path(self._spool.name) / f"{attempt}.parquet"
        try:
            return self._label(shard, attempt, spool)
        except OSError as exc:
            raise _spool_error(exc, spool) from exc
        except WorkerLost:
            raise
        except LabelfleetError as exc:
            where = f"shard {shard.shard_id} ({shard.key})"
            raise type(exc)(f"{where}: {exc.message}", hint=exc.hint) from exc
        finally:
            spool.unlink(missing_ok=True)

    def _label(self, shard: Shard, attempt: str, spool: Path) -> Commit:
        job = _Job(shard, attempt, spool, RowWriter(spool, self._run))
        try:
            self._submit(job)
            job.ended.wait()
            if job.error is not None:
                self._rows.put((job, _ABANDON, None))
                raise job.error
            return self._finish(job)
        finally:
            with self._lock:
                self._jobs_by_id.pop(id(job), None)

    def close(self) -> None:
        """End the threads; attempts in flight fail with WorkerLost. Returns within bounded time."""
        self._break(WorkerLost("the labeller was closed"))
        for stop in (self._jobs, self._ready, self._rows):
            stop.put(None)
        for _ in range(self._options.decode_threads):
            self._fetched.put(None)
        for thread in self._threads:
            thread.join(timeout=5)
        self._spool.cleanup()

    # -- the stages

    def _submit(self, job: _Job) -> None:
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._jobs_by_id[id(job)] = job
            self._upstream += 1
        self._jobs.put(job)

    def _finish(self, job: _Job) -> Commit:
        footer = job.writer.finish(
            job.shard.shard_id,
            job.shard.key,
            job.attempt,
            source_truncated=job.truncated,
            seconds={stage: round(s, 4) for stage, s in job.seconds.items()},
        )
        return self._commit(footer, job.spool)

    def _fetch_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._fetch(job)
            except Exception as exc:  # noqa: BLE001 - border of the shard: its attempt is told
                job.fail(exc)
            finally:
                self._moved(-1)

    def _fetch(self, job: _Job) -> None:
        index = 0
        images = self._read(job.shard, lambda: job.ended.is_set() or self._closed.is_set())
        while True:
            began = time.perf_counter()
            try:
                record = next(images, None)
            except SourceTruncated as exc:
                job.truncated, record = exc.message, None
            except (ObjectNotFound, ObjectChanged) as exc:
                # A tar that is not the one that was listed; a later listing picks it up anew.
                job.truncated = exc.message
                record = _missing(job.shard, exc) if index == 0 else None
                images = iter(())
            job.seconds["fetch"] += time.perf_counter() - began
            if record is None:
                break
            reserved = len(record.data or b"") + self._input_nbytes
            self._budget.reserve(reserved)
            self._moved(+1)
            self._fetched.put(_Fetched(job, index, record, reserved))
            index += 1
        job.fetched = index
        self._rows.put((job, _COUNTED, None))  # the write thread may be waiting for just this

    def _decode_loop(self) -> None:
        size = self._detector.preprocessing
        while (item := self._fetched.get()) is not None:
            job, record = item.job, item.record
            if job.ended.is_set():
                self._leave(item.reserved)
                continue
            began = time.perf_counter()
            prepared = prepare(record, job.shard.shard_id, size, self._options.max_pixels)
            with self._lock:
                job.seconds["decode"] += time.perf_counter() - began
            if isinstance(prepared, Skipped):
                self._leave(item.reserved)
                self._rows.put((job, item.index, prepared.row))
            else:
                self._ready.put(_Ready(job, item.index, record, prepared, item.reserved))

    def _infer_loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            live = [item for item in batch if not item.job.ended.is_set()]
            if live:
                began = time.perf_counter()
                results = self._detect(live)
                share = (time.perf_counter() - began) / len(live)
                for item, detections in zip(live, results, strict=True):
                    item.job.seconds["infer"] += share
                    if detections is not None:
                        row = item.prepared.row(item.record, item.job.shard.shard_id, detections)
                        self._rows.put((item.job, item.index, row))
            for item in batch:
                self._leave(item.reserved)

    def _next_batch(self) -> list[_Ready] | None:
        first = self._ready.get()
        if first is None:
            return None
        batch = [first]
        deadline = time.monotonic() + self._options.partial_batch_ms / 1000
        while len(batch) < self._batch_size:
            # Images in this batch still count as upstream; when there are no others, none comes.
            idle = self._upstream <= len(batch)
            wait_s = 0.0 if idle else deadline - time.monotonic()
            try:
                item = self._ready.get(timeout=wait_s) if wait_s > 0 else self._ready.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._ready.put(None)
                break
            batch.append(item)
        return batch

    def _detect(self, batch: list[_Ready]) -> list[Detections | None]:
        """Detections by image; None where the image's own attempt failed."""
        pixels: NDArray[np.uint8] = np.stack([item.prepared.pixels for item in batch])
        try:
            return list(self._detector.detect(pixels))
        except Exception:  # noqa: BLE001 - the model's border: find out whose fault it was
            alone = [self._detect_alone(item) for item in batch]
        if None not in alone:
            self._batch_size = max(1, len(batch) // 2)  # too large for the device's memory
        return alone

    def _detect_alone(self, item: _Ready) -> Detections | None:
        try:
            (detections,) = self._detector.detect(item.prepared.pixels[None])
            return detections
        except Exception as exc:  # noqa: BLE001 - as above
            self._blame(item, exc)
            return None

    def _blame(self, item: _Ready, exc: Exception) -> None:
        """The image's shard, if a blank image still works; else the whole worker."""
        try:
            self._detector.detect(np.zeros_like(item.prepared.pixels[None]))
        except Exception as again:  # noqa: BLE001 - as above
            self._break(WorkerLost(f"the detector is broken: {type(again).__name__}: {again}"))
        cause = f"{type(exc).__name__}: {exc}"
        item.job.fail(ShardFailed(f"inference failed on {item.record.image_id!r}: {cause}"))

    def _write_loop(self) -> None:
        while (entry := self._rows.get()) is not None:
            job, index, row = entry
            if index == _ABANDON:
                with suppress(Exception):  # on a full disk; nobody wants the file any more
                    job.writer.abandon()
            if job.ended.is_set():
                continue
            began = time.perf_counter()
            try:
                self._write(job, index, row)
            except OSError as exc:
                job.fail(_spool_error(exc, job.spool))
                continue
            except Exception as exc:  # noqa: BLE001 - border of the shard: its attempt is told
                job.fail(exc)
                continue
            job.seconds["write"] += time.perf_counter() - began
            if job.written == job.fetched:
                job.ended.set()

    def _write(self, job: _Job, index: int, row: AnnotationRow | None) -> None:
        """Rows arrive in any order and leave in that of the shard."""
        if row is not None:
            job.pending[index] = row
        while (due := job.pending.pop(job.written, None)) is not None:
            job.writer.write(due)
            job.written += 1
            self._images_done += 1

    # -- bookkeeping

    def _moved(self, by: int) -> None:
        with self._lock:
            self._upstream += by

    def _leave(self, reserved: int) -> None:
        self._budget.release(reserved)
        self._moved(-1)

    def _guard(self, loop: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                loop()
            except Exception as exc:  # noqa: BLE001 - no attempt may wait for a dead thread
                self._break(WorkerLost(f"a worker thread died: {type(exc).__name__}: {exc}"))

        return run

    def _break(self, error: WorkerLost) -> None:
        """Nothing more can be labelled here; every attempt in flight is told."""
        with self._lock:
            self._broken = self._broken or error
            jobs = list(self._jobs_by_id.values())
        for job in jobs:  # before the readers see that they are to stop, and call it their error
            job.fail(self._broken)
        self._closed.set()
        self._budget.close()

"""ShardLabeller: shard in, committed rows out, through persistent threads. Plain Python, no Ray.

    label(shard) ─> fetch ─> decode × n ─> infer ─> NMS × m ─> write ─> one conditional put

The threads live as long as the labeller, so batches cross shard borders and no shard waits for
the one before it. What waits between the stages is bounded: encoded images by their bytes,
decoded ones by the slots of a few batches, which decoders write into and the model reads from.
Every image that a shard yields becomes a row; an error that is a shard's own ends that shard's
attempt and no other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Protocol

from storage.errors import (
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    SourceTruncated,
    StorageError,
    WorkerLost,
)
from storage.records import AnnotationRow, ImageRecord, RunIdentity, Shard, printable
from storage.runs.annotation_rows import rows_to_table
from storage.runs.annotations import RowWriter, ShardFooter
from storage.runs.manifest import Commit
from storage.waiting import wait_for
from workers.detectors.protocol import Detector, QueueingDetector
from workers.images.pixels import libvips
from workers.images.prepare import OpenedImage
from workers.images.preprocessing import Tiles, Window
from workers.labelling.batch_size import BatchSize
from workers.labelling.infer_stage import InferStage
from workers.labelling.inference import Inference
from workers.labelling.job import ShardJob, with_commit_seconds
from workers.labelling.job_image import JobImage, Part
from workers.labelling.queues import BatchRing, ByteBudget
from workers.labelling.spool import spool_error
from workers.labelling.writing import Abandoned, Counted, RowStage
from workers.local_folders import own_folder
from workers.spec import LabellerOptions

# In the making, waiting, with the model, in NMS: with fewer, stages wait for each other. One more
# where two are with the model.
_BATCHES = 4


class ReadsShards(Protocol):
    """Where images come from: ``storage.shards.reading.read_shard`` over one store."""

    def __call__(self, shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]: ...


class Commits(Protocol):
    """Where rows go: ``Manifest.commit``."""

    def __call__(self, footer: ShardFooter, spool: Path) -> Commit: ...


class ShardLabeller:
    """Labels shards one after the other or several at once; ``label`` may be called from threads.

    Args:
        detector: used by one thread only.
        read: yields a shard's images.
        commit: puts a finished spool file where it belongs.
        run: repeated in every annotation object.
        options: sizes of the pipeline.
        tiles: how large images are cut; None: the network sees every image as a whole.
    """

    def __init__(
        self,
        detector: Detector,
        read: ReadsShards,
        commit: Commits,
        run: RunIdentity,
        options: LabellerOptions | None = None,
        *,
        tiles: Tiles | None = None,
    ) -> None:
        self._read, self._commit, self._run = read, commit, run
        self._options = options or LabellerOptions()
        self._spool = own_folder("spool")
        libvips()  # loads its library, which the first PNG would wait for
        rows_to_table(())  # imports pandas, which pyarrow looks for at its first array: 0.3 s
        self._preprocessing, self._tiles = detector.preprocessing, tiles
        # A tile needs every pixel of its image.
        self._decoding = replace(
            self._preprocessing, decode="exact" if tiles else self._preprocessing.decode
        )
        self._batch_size = BatchSize(
            self._options.batch_size,
            self._options.batch_size_max,
            cost=median if isinstance(detector, QueueingDetector) else min,
        )
        inference = Inference(detector, self._batch_size)
        self._budget = ByteBudget(self._options.queued_bytes)
        self._ring: BatchRing[Part] = BatchRing(
            inference.empty,
            lambda: self._batch_size.now,
            buffers=_BATCHES + inference.queues,
            partial_s=self._options.partial_batch_ms / 1000,
        )
        self._jobs: queue.SimpleQueue[ShardJob | None] = queue.SimpleQueue()
        self._fetched: queue.SimpleQueue[JobImage | None] = queue.SimpleQueue()
        self._rows = RowStage()
        self._infer = InferStage(inference, self._ring, self._budget, self._rows)
        self._lock = threading.Lock()
        self._broken: WorkerLost | None = None
        self._jobs_by_id: dict[int, ShardJob] = {}
        loops = [self._fetch_loop, self._infer.infer_loop, self._rows.loop]
        loops += [self._decode_loop] * self._options.decode_threads
        loops += [self._infer.nms_loop] * self._options.nms_threads
        # Daemons: a thread that outlived its actor would keep the process, and its GPU, alive.
        self._threads = [threading.Thread(target=self._guard(f), daemon=True) for f in loops]
        for thread in self._threads:
            thread.start()

    @property
    def images_done(self) -> int:
        """Images that became rows so far, and tiles of others; what the hang clock watches."""
        return self._rows.images_done + self._infer.parts_done

    @property
    def batch_size(self) -> int:
        """Images of a batch, as of now."""
        return self._batch_size.now

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
            if self._broken is not None:  # closed before it began: the folder is gone
                raise self._broken from exc
            raise spool_error(exc, spool) from exc
        except WorkerLost:
            raise
        except LabelfleetError as exc:
            where = f"shard {shard.shard_id} ({shard.key})"
            raise type(exc)(f"{where}: {exc.message}", hint=exc.hint) from exc
        finally:
            spool.unlink(missing_ok=True)

    def _label(self, shard: Shard, attempt: str, spool: Path) -> Commit:
        job = ShardJob(shard, attempt, spool, RowWriter(spool, self._run))
        try:
            self._submit(job)
            wait_for(job.ended)
            if job.error is not None:
                self._rows.put(Abandoned(job))
                raise job.error
            footer = job.finish()
            began_s = time.perf_counter()
            commit = self._commit(footer, spool)
            return with_commit_seconds(commit, time.perf_counter() - began_s)
        finally:
            job.over = True  # also where the caller was interrupted: its reading stops
            with self._lock:
                self._jobs_by_id.pop(id(job), None)

    def close(self) -> None:
        """End the threads; attempts in flight fail with WorkerLost. Returns within bounded time."""
        self._break(WorkerLost("the labeller was closed"))
        self._jobs.put(None)
        self._rows.put(None)
        for _ in range(self._options.decode_threads):
            self._fetched.put(None)
        self._infer.stop(self._options.nms_threads)
        for thread in self._threads:
            thread.join(timeout=5)
        self._spool.cleanup()

    # -- the stages

    def _submit(self, job: ShardJob) -> None:
        with self._lock:
            if self._broken is not None:
                raise self._broken
            self._jobs_by_id[id(job)] = job
        self._ring.expect(1)  # until it is read, more images may come
        self._jobs.put(job)

    def _fetch_loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._fetch(job)
            except MemoryError:
                raise  # the worker's trouble, no shard's
            except Exception as exc:  # noqa: BLE001 - border of the shard: its attempt is told
                job.fail(exc)
            finally:
                self._ring.expect(-1)

    def _fetch(self, job: ShardJob) -> None:
        index = 0
        images = self._read(job.shard, lambda: job.over)
        while True:
            began_s = time.perf_counter()
            try:
                record = next(images, None)
            except SourceTruncated as exc:
                job.truncated, record = exc.message, None
            except (ObjectNotFound, ObjectChanged) as exc:
                # A tar that is not the one that was listed. Where members were read already, the
                # next attempt sees whether it is gone: part of them must not be committed.
                if index:
                    raise
                job.truncated = exc.message
                record, images = _missing(job.shard, exc), iter(())
            job.seconds["fetch"] += time.perf_counter() - began_s
            if record is None:
                break
            image = JobImage(job, index, record.image_id, record)
            self._budget.reserve(image.waiting_nbytes)
            self._ring.expect(1)
            self._fetched.put(image)
            index += 1
        job.fetched = index
        self._rows.put(Counted(job))  # the write thread may be waiting for just this

    def _decode_loop(self) -> None:
        while (image := self._fetched.get()) is not None:
            if image.job.over:
                self._budget.release(image.waiting_nbytes)
                self._ring.expect(-1)
            else:
                self._decode(image)

    def _decode(self, image: JobImage) -> None:
        began_s, reserved = time.perf_counter(), image.waiting_nbytes
        opened = image.open(self._decoding, self._options.max_pixels)
        spent_s = time.perf_counter() - began_s
        self._budget.release(reserved)
        if isinstance(opened, AnnotationRow):
            image.job.spent("decode", spent_s)
            self._ring.expect(-1)
            self._rows.put([image])
            return
        height, width = opened.image.size
        windows = self._tiles.windows(width, height) if self._tiles else []
        if len(windows) < 2:
            self._place_one(image, opened, 0, None, spent_s)
        else:
            image.job.spent("decode", spent_s)
            self._place_windows(image, opened, windows)
        opened.release()

    def _place_windows(self, image: JobImage, opened: OpenedImage, windows: list[Window]) -> None:
        self._ring.expect(len(windows) - 1)
        image.windows = windows
        for number, window in enumerate(windows):
            if not self._place_one(image, opened, number, window, 0.0):
                self._ring.expect(number + 1 - len(windows))
                return

    def _place_one(
        self,
        image: JobImage,
        opened: OpenedImage,
        number: int,
        window: Window | None,
        spent_s: float,
    ) -> bool:
        """Fill a slot with an image, or a part of it; False: the rest of it is not wanted.

        Args:
            spent_s: on decoding it, not told yet.
        """
        if (slot := self._ring.take()) is None:
            return False  # closing: the job has been told
        began_s = time.perf_counter()
        placed = opened.place(self._preprocessing, slot.pixels, window)
        image.job.spent("decode", spent_s + time.perf_counter() - began_s)
        if isinstance(placed, AnnotationRow):
            self._ring.fill(slot, None)
            if image.fail(placed):
                self._rows.put([image])
            return False
        self._ring.fill(slot, Part(image, number, placed))
        return not image.job.over and not image.failed

    # -- bookkeeping

    def _guard(self, loop: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                loop()
            except WorkerLost as exc:
                self._break(exc)
            except Exception as exc:  # noqa: BLE001 - no attempt may wait for a dead thread
                self._break(WorkerLost(f"a worker thread died: {type(exc).__name__}: {exc}"))

        return run

    def _break(self, error: WorkerLost) -> None:
        """Fail every attempt in flight: nothing more can be labelled here."""
        with self._lock:
            self._broken = self._broken or error
            jobs = list(self._jobs_by_id.values())
        for job in jobs:
            job.fail(self._broken)
        self._budget.close()
        self._ring.close()


def _missing(shard: Shard, error: StorageError) -> ImageRecord:
    return ImageRecord(
        printable(shard.key), None, shard.nbytes, None, "missing", printable(error.message)
    )

"""The inference stage of a worker: whole batches in, network, parallel NMS, rows out."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from storage.errors import ShardFailed
from storage.records import Detections
from workers.images.prepare import Prepared
from workers.labelling.inference import Inference, Inferred, Results
from workers.labelling.job import ShardJob
from workers.labelling.queues import Batch, BatchRing, ByteBudget
from workers.labelling.tiled import Part
from workers.labelling.writing import MadeRow, RowStage


@dataclass(frozen=True, slots=True)
class Ready:
    """What is in a slot of a batch: one image of a job, or a part of one, decoded and placed."""

    job: ShardJob
    index: int
    prepared: Prepared
    part: Part | None = None

    def finished(self, found: Detections) -> MadeRow | None:
        """Return the image's row; None while parts of it are missing."""
        if self.part is None:
            return MadeRow(self.job, self.index, partial(self.prepared.row, found))
        image = self.part.image
        if not image.add(self.part.number, self.prepared, found):
            return None
        return MadeRow(self.job, self.index, partial(image.row, self.prepared))


@dataclass(frozen=True, slots=True)
class _Launched:
    batch: Batch[Ready]
    images: list[Ready]
    wait: Callable[[], Inferred]
    waited_s: float
    fill: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """For NMS."""

    batch: Batch[Ready]
    images: list[Ready]
    finish: Callable[[], Results]


class InferStage:
    """The work of the infer thread and of the NMS threads behind it.

    Args:
        inference: used by the infer thread only.
        ring: where batches come from; each is freed once its detections are made, so what waits
            for NMS is bounded too.
        budget: looked at, for how full it is.
        rows: where rows go.
    """

    def __init__(
        self,
        inference: Inference,
        ring: BatchRing[Ready],
        budget: ByteBudget,
        rows: RowStage,
    ) -> None:
        self._inference, self._ring = inference, ring
        self._budget, self._rows = budget, rows
        self.parts_done = 0  # of images in tiles, beside each image's last
        self._inferred: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()

    def stop(self, nms_threads: int) -> None:
        """End the NMS threads; the infer thread ends with the ring."""
        for _ in range(nms_threads):
            self._inferred.put(None)

    def infer_loop(self) -> None:
        """Run until the ring is closed. Where the detector queues, a batch that is ready is
        launched before the one in front of it is waited for, so that the device need not wait for
        us."""
        running: _Launched | None = None
        while True:
            asked_s = time.perf_counter()
            batch = self._ring.next(wait=running is None)
            if batch is None and running is None:
                return
            waited_s = time.perf_counter() - asked_s
            launched = None if batch is None else self._launch(batch, waited_s)
            if running is not None:
                self._complete(running)
            running = launched
            if running is not None and not self._inference.queues:
                self._complete(running)
                running = None

    def _launch(self, batch: Batch[Ready], waited_s: float) -> _Launched | None:
        live = [
            (place, item)
            for place, item in enumerate(batch.items)
            if item is not None and not item.job.ended.is_set()
        ]
        if not live:
            self._ring.free(batch)
            return None
        fill = {"fetched": self._budget.fill, "decoded": self._ring.waiting}
        pixels = batch.pixels[: len(live)]
        if len(live) < len(batch.items):  # some ended, or could not be placed
            pixels = batch.pixels[[place for place, _ in live]]
        images = [item for _, item in live]
        wait = self._inference.launch(pixels, [item.prepared.image_id for item in images])
        return _Launched(batch, images, wait, waited_s, fill)

    def _complete(self, launched: _Launched) -> None:
        inferred = launched.wait()
        seconds = {"wait": launched.waited_s, "infer": inferred.seconds}
        for item in launched.images:
            item.job.inferred_in(len(launched.images), seconds, launched.fill)
        self._inferred.put(_Waiting(launched.batch, launched.images, inferred.finish))

    def nms_loop(self) -> None:
        """Run until stopped."""
        while (inferred := self._inferred.get()) is not None:
            began_s = time.perf_counter()
            results = inferred.finish()
            self._ring.free(inferred.batch)
            share_s = (time.perf_counter() - began_s) / len(results)
            rows = []
            for item, found in zip(inferred.images, results, strict=True):
                item.job.spent("nms", share_s)
                if isinstance(found, ShardFailed):
                    item.job.fail(found)
                elif (row := item.finished(found)) is not None:
                    rows.append(row)
                else:
                    self.parts_done += 1
            self._rows.put(rows)

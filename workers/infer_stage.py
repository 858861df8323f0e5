"""The model's part of a worker: whole batches in, the network, NMS beside it, rows out."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from storage.errors import ShardFailed
from workers.inference import Inference, Results
from workers.job import Job
from workers.prepare import Prepared
from workers.queues import Batch, BatchRing, ByteBudget
from workers.writing import MadeRow, RowStage


@dataclass(frozen=True, slots=True)
class Ready:
    """What is in a slot of a batch: one image of a job, decoded and placed."""

    job: Job
    index: int
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class _Inferred:
    batch: Batch[Ready]
    images: list[Ready]
    finish: Callable[[], Results]


class InferStage:
    """What the infer thread does, and the NMS threads behind it.

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
        self._inferred: queue.SimpleQueue[_Inferred | None] = queue.SimpleQueue()

    def stop(self, nms_threads: int) -> None:
        """End the NMS threads; the infer thread ends with the ring."""
        for _ in range(nms_threads):
            self._inferred.put(None)

    def infer_loop(self) -> None:
        """Until the ring is closed."""
        asked_s = time.perf_counter()
        while (batch := self._ring.next()) is not None:
            waited_s = time.perf_counter() - asked_s
            live = [
                (place, item)
                for place, item in enumerate(batch.items)
                if item is not None and not item.job.ended.is_set()
            ]
            if live:
                self._infer(batch, live, waited_s)
            else:
                self._ring.free(batch)
            asked_s = time.perf_counter()

    def _infer(self, batch: Batch[Ready], live: list[tuple[int, Ready]], waited_s: float) -> None:
        fill = {"fetched": self._budget.fill, "decoded": self._ring.waiting}
        pixels = batch.pixels[: len(live)]
        if len(live) < len(batch.items):  # some ended, or could not be placed
            pixels = batch.pixels[[place for place, _ in live]]
        images = [item for _, item in live]
        began_s = time.perf_counter()
        finish = self._inference.start(pixels, [item.prepared.image_id for item in images])
        seconds = {"wait": waited_s, "infer": time.perf_counter() - began_s}
        for item in images:
            item.job.inferred_in(len(images), seconds, fill)
        self._inferred.put(_Inferred(batch, images, finish))

    def nms_loop(self) -> None:
        """Until it is stopped."""
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
                else:
                    rows.append(MadeRow(item.job, item.index, partial(item.prepared.row, found)))
            self._rows.put(rows)

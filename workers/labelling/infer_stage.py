"""The inference stage of a worker: whole batches in, network, parallel NMS, rows out."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from storage.errors import OutputNotFinite, ShardFailed
from workers.images.prepare import OpenedImage
from workers.labelling.inference import Inference, Inferred
from workers.labelling.job_image import JobImage, Part
from workers.labelling.queues import Batch, BatchRing, ByteBudget
from workers.labelling.writing import RowStage

_NOT_FINITE = "the network gave NaN or infinity for it, twice, and none for a blank image"


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A batch with the network, then with NMS.

    Attributes:
        parts: what is in its slots.
        wait: for the network.
        waited_s: how long the infer thread waited for the batch.
        fill: how full the queues were at its launch.
    """

    batch: Batch[Part]
    parts: list[Part]
    wait: Callable[[], Inferred]
    waited_s: float
    fill: dict[str, float]


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
        ring: BatchRing[Part],
        budget: ByteBudget,
        rows: RowStage,
    ) -> None:
        self._inference, self._ring = inference, ring
        self._budget, self._rows = budget, rows
        self.parts_done = 0  # of images in tiles, beside each image's last
        self._inferred: queue.SimpleQueue[tuple[_InFlight, Inferred] | None] = queue.SimpleQueue()

    def stop(self, nms_threads: int) -> None:
        """End the NMS threads; the infer thread ends with the ring."""
        for _ in range(nms_threads):
            self._inferred.put(None)

    def infer_loop(self) -> None:
        """Run until the ring is closed. Where the detector queues, a batch that is ready is
        launched before the one in front of it is waited for, so that the device need not wait for
        us."""
        running: _InFlight | None = None
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

    def _launch(self, batch: Batch[Part], waited_s: float) -> _InFlight | None:
        live = [
            (place, item)
            for place, item in enumerate(batch.items)
            if item is not None and not item.image.job.over and not item.image.failed
        ]
        if not live:
            self._ring.free(batch)
            return None
        fill = {"fetched": self._budget.fill, "decoded": self._ring.waiting}
        pixels = batch.pixels[: len(live)]
        if len(live) < len(batch.items):  # some ended or failed, or could not be placed
            pixels = batch.pixels[[place for place, _ in live]]
        parts = [item for _, item in live]
        names = [part.image.image_id for part in parts]
        return _InFlight(batch, parts, self._inference.launch(pixels, names), waited_s, fill)

    def _complete(self, running: _InFlight) -> None:
        inferred = running.wait()
        seconds = {"wait": running.waited_s, "infer": inferred.seconds}
        batch = len(running.parts)
        for job, images in Counter(part.image.job for part in running.parts).items():
            job.inferred_in(batch, images, seconds, running.fill)
        self._inferred.put((running, inferred))

    def nms_loop(self) -> None:
        """Run until stopped."""
        while (entry := self._inferred.get()) is not None:
            in_flight, inferred = entry
            began_s = time.perf_counter()
            results = inferred.finish()
            self._ring.free(in_flight.batch)
            share_s = (time.perf_counter() - began_s) / len(results)
            for job, images in Counter(part.image.job for part in in_flight.parts).items():
                job.spent("nms", share_s * images)
            done = []
            for part, found in zip(in_flight.parts, results, strict=True):
                if isinstance(found, ShardFailed):
                    part.image.job.fail(found)
                elif (
                    _set_aside(part.image)
                    if isinstance(found, OutputNotFinite)
                    else part.image.add(part.number, part.transform, found)
                ):
                    done.append(part.image)
                else:
                    self.parts_done += 1
            self._rows.put(done)


def _set_aside(image: JobImage) -> bool:
    """Make an image without a finite output its row; False: another part of it did so before."""
    opened = image.opened
    return isinstance(opened, OpenedImage) and image.fail(opened.failed("not_finite", _NOT_FINITE))

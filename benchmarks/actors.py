"""Actors for benchmarks: around any detector, or one that takes a fixed time as a GPU would."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.detectors import FreeDetector
from storage.records import Detections, ImageRecord, Shard
from storage.runs.manifest import Manifest
from storage.shards.reading import read_shard
from storage.stores.open import open_store
from workers.actors.actor import LabelActor, WorkerFacts
from workers.detectors.protocol import Detector
from workers.labelling.labeller import ShardLabeller

SIZE = (64, 64)


class Sleeping(FreeDetector):
    """Takes a fixed time an image, and no core of this machine."""

    def __init__(self, image_s: float) -> None:
        super().__init__(SIZE)
        self._image_s = image_s
        self._due_s = 0.0

    def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        """As a device that is never early and never waits for the thread that feeds it."""
        self._due_s = max(self._due_s, time.monotonic()) + self._image_s * len(batch)
        time.sleep(max(0.0, self._due_s - time.monotonic()))
        return super().detect(batch)


def actor_around(make: Callable[[], Detector]) -> type[LabelActor]:
    """Return a class for ``LabelPool`` whose actors label with what ``make`` returns there."""

    class BenchmarkActor(LabelActor):
        def start(self) -> WorkerFacts:
            spec = self._spec
            manifest = Manifest.open(spec.output_url, spec.storage)
            source = open_store(spec.source_url, spec.storage)

            def read(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
                limit = spec.options.max_image_bytes
                return read_shard(source, shard, max_image_bytes=limit, abort=abort)

            cv2.setNumThreads(1)
            run = manifest.record.identity
            self._labeller = ShardLabeller(make(), read, manifest.commit, run, spec.options)
            return WorkerFacts(socket.gethostname(), os.getpid(), "cpu", spec.options.batch_size)

    return BenchmarkActor

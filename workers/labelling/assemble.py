"""From a WorkerSpec to a running ShardLabeller: where store, model and threads meet."""

from __future__ import annotations

import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Protocol

import cv2

from storage.errors import BucketNotFound, ObjectNotFound, StorageError
from storage.objects.protocols import SupportsList, SupportsStream
from storage.records import ImageRecord, Shard
from storage.runs.manifest import Manifest
from storage.shards.reading import read_shard
from storage.stores.open import open_store
from workers.images.frames import frames_of
from workers.labelling.labeller import ShardLabeller
from workers.models.load import load_detector
from workers.spec import WorkerSpec

_PROBED = 200  # objects tried for one that can be read, drawn from the first _LISTED
_LISTED = 50_000  # what is archived or forbidden often lies in one folder, which sorts together
_PROBE_HOLDS_S = 10.0


def _refusing_a_vanished_source(
    images: Iterator[ImageRecord], source: SupportsList
) -> Iterator[ImageRecord]:
    """Yield a shard's images; tell missing images (rows) from a missing source (an error).

    Raises:
        BucketNotFound: something was missing, and so is everything else.
    """
    missing = False
    try:
        for image in images:
            missing = missing or image.status == "missing"
            yield image
    except ObjectNotFound:
        _refuse_empty(source)
        raise
    if missing:
        _refuse_empty(source)


def _refuse_empty(source: SupportsList) -> None:
    if next(source.list(), None) is None:
        raise BucketNotFound(
            f"the whole source is gone as seen from {socket.gethostname()}",
            hint="if it is a mounted folder, check the mount there; then run the same command",
        )


class SupportsProbe(SupportsList, SupportsStream, Protocol):
    """What looking for a readable object needs of a store."""


class _Others:
    """Whether objects of a source can be read at all; asked where access to one is denied."""

    def __init__(self, source: SupportsProbe) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._seen_s = -math.inf

    def readable(self) -> bool:
        """Return whether a byte of any object drawn can be read; a yes holds for some seconds."""
        with self._lock:
            if time.monotonic() - self._seen_s < _PROBE_HOLDS_S:
                return True
            found = list(islice(self._source.list(), _LISTED))
            for listed in random.sample(found, min(_PROBED, len(found))):
                with suppress(StorageError), self._source.stream(listed.key) as file:
                    file.read(1)
                    self._seen_s = time.monotonic()
                    return True
        return False


def open_labeller(spec: WorkerSpec) -> ShardLabeller:
    """Load the model, open source and output, start the threads.

    Raises:
        ModelError: the model cannot be loaded on this machine.
        StorageError, ConfigError: the run cannot be opened from here.
    """
    # The decode threads are the parallelism; OpenCV's own would compete with them and with torch.
    cv2.setNumThreads(1)
    manifest = Manifest.open(spec.output_url, spec.storage)
    source = open_store(spec.source_url, spec.storage)
    detector = load_detector(spec.model, spec.storage, threads=spec.torch_threads)
    options = spec.options
    others = _Others(source)
    frames = frames_of(options.max_frames, options.max_pixels) if options.max_frames else None

    def read(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        images = read_shard(
            source,
            shard,
            max_image_bytes=options.max_image_bytes,
            abort=abort,
            others_readable=others.readable,
            frames=frames,
        )
        return _refusing_a_vanished_source(images, source)

    return ShardLabeller(
        detector, read, manifest.commit, manifest.record.identity, options, tiles=spec.model.tiles
    )

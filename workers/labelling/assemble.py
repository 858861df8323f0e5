"""From a WorkerSpec to a running ShardLabeller: where store, model and threads meet."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import cv2

from storage.errors import BucketNotFound, ObjectNotFound
from storage.objects.protocols import SupportsList
from storage.records import ImageRecord, Shard
from storage.runs.manifest import Manifest
from storage.shards.reading import read_shard
from storage.stores.open import open_store
from workers.labelling.labeller import ShardLabeller
from workers.models.load import load_detector
from workers.spec import WorkerSpec


def _refusing_a_vanished_source(
    images: Iterator[ImageRecord], source: SupportsList
) -> Iterator[ImageRecord]:
    """An image that is gone is a row; a source that is gone (a mount that dropped) is an error.

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

    def read(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        images = read_shard(source, shard, max_image_bytes=options.max_image_bytes, abort=abort)
        return _refusing_a_vanished_source(images, source)

    return ShardLabeller(detector, read, manifest.commit, manifest.record.identity, options)

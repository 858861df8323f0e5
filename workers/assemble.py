"""From a WorkerSpec to a running ShardLabeller: where store, model and threads meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cv2

from storage.manifest import Manifest
from storage.objects import open_store
from storage.records import ImageRecord, Shard
from storage.shards import read_shard
from workers.labeller import ShardLabeller
from workers.spec import WorkerSpec
from workers.yolo_nas import load_detector


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
        return read_shard(source, shard, max_image_bytes=options.max_image_bytes, abort=abort)

    return ShardLabeller(detector, read, manifest.commit, manifest.record.identity, options)

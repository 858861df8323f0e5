"""One worker's pipeline without Ray, as an actor runs it: a folder in, committed Parquet out."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.truth.coco_classes import categories_for
from storage.objects.protocols import ObjectStore
from storage.records import ImageRecord, RunIdentity, Shard
from storage.runs.annotations import ShardFooter
from storage.runs.manifest import Commit, Manifest, RunRecord
from storage.shards.reading import read_shard
from storage.shards.selecting import group_images, list_source, tar_shards
from storage.stores.open import open_store
from workers.detectors.protocol import Detector
from workers.images.decode import decode
from workers.images.letterbox import letterbox
from workers.images.preprocessing import Preprocessing, Tiles
from workers.labelling.labeller import ShardLabeller
from workers.spec import LabellerOptions

CORES = len(os.sched_getaffinity(0))
DEPTH = 3  # shards in flight, as the driver keeps them


class Worker:
    """A labeller that lives through all rounds, as an actor does through a run.

    Args:
        detector: what it runs.
        tiles: how large images are cut.
        options: its sizes; decode threads as ``pipelines.cluster.sizing`` would give them.
    """

    def __init__(
        self,
        detector: Detector,
        options: LabellerOptions,
        scratch: Path,
        tiles: Tiles | None = None,
    ) -> None:
        cv2.setNumThreads(1)  # as workers.labelling.assemble does
        self._scratch = scratch
        self._manifest: Manifest | None = None
        self._source: ObjectStore
        identity = identity_of(detector.classes)
        self._labeller = ShardLabeller(
            detector, self._read, self._commit, identity, options, tiles=tiles
        )
        self._record = RunRecord(identity, {}, {}, "2026-01-01T00:00:00+00:00")

    @property
    def manifest(self) -> Manifest:
        """The run that ``label`` wrote last."""
        if self._manifest is None:
            raise ValueError("nothing was labelled yet")
        return self._manifest

    @property
    def batch_size(self) -> int:
        """As the worker has found it by now."""
        return self._labeller.batch_size

    def label(self, source: Path | ObjectStore, *, shard_size: int = 1000) -> int:
        """Label a source of tars or of loose images into a fresh output; returns its rows."""
        output = open_store(str(self._scratch / f"out-{secrets.token_hex(4)}"))
        self._manifest = Manifest.create_or_continue(output, self._record)
        self._source = open_store(str(source)) if isinstance(source, Path) else source
        listed = list(list_source(self._source))
        shards = [*tar_shards(listed), *group_images(listed, shard_size)]
        with ThreadPoolExecutor(DEPTH) as callers:
            commits = callers.map(lambda s: self._labeller.label(s, secrets.token_hex(8)), shards)
            return sum(commit.footer.counts["ok"] for commit in commits)

    def warm_up(self, source: Path) -> None:
        """Label the folder until the batch size stands still."""
        before = 0
        while before != self.batch_size:
            before = self.batch_size
            for _ in range(2):
                self.label(source)

    def close(self) -> None:
        """End its threads."""
        self._labeller.close()

    def _read(self, shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        return read_shard(self._source, shard, max_image_bytes=1 << 29, abort=abort)

    def _commit(self, footer: ShardFooter, spool: Path) -> Commit:
        assert self._manifest is not None
        return self._manifest.commit(footer, spool)


def identity_of(classes: tuple[str, ...]) -> RunIdentity:
    """Return a run's identity, for outputs that are thrown away."""
    return RunIdentity(
        name="benchmark", config_hash="0" * 16, model_sha256="0" * 64, licence="none",
        runtime="torch", precision="fp32", code_version="0", categories=categories_for(classes),
    )  # fmt: skip


def decode_all(
    photos: list[bytes], preprocessing: Preprocessing, threads: int = CORES
) -> NDArray[np.uint8]:
    """Run the bare loop: decode and letterbox, on that many threads, into one array; nothing else.

    Only the last 32 images are kept, so that memory does not affect the measurement.
    """
    cv2.setNumThreads(1)
    kept = np.empty((32, *preprocessing.size, 3), np.uint8)

    def every(start: int) -> None:
        for i in range(start, len(photos), threads):
            image = decode(photos[i], max_pixels=1 << 30, enough=preprocessing)
            slot = kept[i % len(kept)]
            letterbox(image.pixels, preprocessing, slot, size=image.size, factor=image.factor)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(every, range(threads)))
    return kept

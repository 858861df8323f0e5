"""Runs whose images all differ, for tests of routing, merging and estimating."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from storage.objects.protocols import ObjectStore
from storage.records import AnnotationRow, Detections, Shard
from storage.runs.manifest import Manifest
from tests.support.samples.synthetic_run import (
    boxes,
    commit_rows,
    list_shards,
    make_run,
    random_boxes,
    row,
    tar_shard,
)


def distinct_row(
    image_id: str, shard: Shard, detections: Detections | None = None, **changes: object
) -> AnnotationRow:
    """Return a row whose sha256 and phash come from the image id."""
    digest = hashlib.sha256(image_id.encode()).hexdigest()
    made = row(image_id, shard.shard_id, detections)
    return replace(made, sha256=digest, phash=int(digest[:16], 16), **changes)  # type: ignore[arg-type]


def random_shards(
    n_shards: int, n_images: int, *, seed: int = 0, first: int = 0
) -> dict[Shard, list[AnnotationRow]]:
    """Return shards of images with 0 to 12 random boxes."""
    rng = np.random.default_rng(seed)
    labelled = {}
    for k in range(first, first + n_shards):
        shard = tar_shard(f"{k:04d}.tar")
        labelled[shard] = [
            distinct_row(
                f"{k:04d}.tar/{i:04d}.jpg", shard,
                random_boxes(rng, int(rng.integers(0, 13)), 640, 480),
            )
            for i in range(n_images)
        ]  # fmt: skip
    return labelled


def random_run(store: ObjectStore, n_shards: int, n_images: int, *, seed: int = 0) -> Manifest:
    """Return a run over ``random_shards``."""
    return make_run(store, random_shards(n_shards, n_images, seed=seed))


def add_shards(
    manifest: Manifest, old: Sequence[Shard], new: dict[Shard, list[AnnotationRow]]
) -> None:
    """A later invocation: ``new`` is listed and labelled too."""
    list_shards(manifest.store, [*old, *new])
    for shard, rows in new.items():
        commit_rows(manifest, shard, rows)


def one_box(score: float, category_id: int = 0) -> Detections:
    """One box of 100 by 100 pixels."""
    return boxes([[10, 10, 110, 110]], [score], [category_id])

"""Runs made by hand: rows, shards and commits without a model, for tests of what reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from storage.objects.protocols import ObjectStore
from storage.records import (
    AnnotationRow,
    Category,
    Detections,
    RunIdentity,
    Shard,
    StoredObject,
    shard_id_of,
)
from storage.runs.annotations import RowWriter
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest, RunRecord, config_hash

CLASSES = ("RBC", "WBC", "Platelets")


def identity(classes: Sequence[str] = CLASSES) -> RunIdentity:
    """Return a run's identity; official ids start at 1."""
    return RunIdentity(
        name="cells",
        config_hash="0" * 16,
        model_sha256="ab" * 32,
        licence="MIT",
        runtime="torch",
        precision="fp32",
        code_version="0.1.0",
        categories=tuple(Category(i, name, i + 1) for i, name in enumerate(classes)),
    )


def record(
    classes: Sequence[str] = CLASSES, source: str = "memory://nowhere", **inference: object
) -> RunRecord:
    """Return a run.json."""
    settings = {"score_floor": 0.05, "nms_iou": 0.7, **inference}
    return RunRecord(
        identity=replace(identity(classes), config_hash=config_hash(settings)),
        source={"url": source, "kind": "auto"},
        inference=settings,
        created_at="2026-01-31T12:00:00+00:00",
    )


def with_inference(made: RunRecord, **inference: object) -> RunRecord:
    """Return a run.json with further settings, and the hash of all of them."""
    settings = {**made.inference, **inference}
    named = replace(made.identity, config_hash=config_hash(settings))
    return replace(made, identity=named, inference=settings)


def boxes(
    xyxy: Iterable[Sequence[float]],
    scores: Iterable[float],
    category_ids: Iterable[int],
    topk: int = 3,
) -> Detections:
    """Detections with the given boxes, and plausible values for the rest."""
    at = np.asarray(list(xyxy), np.float32).reshape(-1, 4)
    n = len(at)
    score = np.asarray(list(scores), np.float32)
    ids = np.asarray(list(category_ids), np.int16)
    return Detections(
        boxes=at,
        scores=score,
        category_ids=ids,
        topk_ids=(ids[:, None] + np.arange(topk)).astype(np.int16) % max(topk, 1),
        topk_scores=np.linspace(1, 0.1, topk, dtype=np.float32)[None] * score[:, None],
        box_std=np.full((n, 4), 1.5, np.float32),
        box_entropy=np.full(n, 0.7, np.float32),
        anchor=np.arange(n, dtype=np.int32),
    )


def random_boxes(
    rng: np.random.Generator, n: int, width: int, height: int, n_categories: int = 3
) -> Detections:
    """``n`` boxes inside an image of that size, highest score first."""
    x = np.sort(rng.uniform(0, width, (n, 2)), axis=1)
    y = np.sort(rng.uniform(0, height, (n, 2)), axis=1)
    xyxy = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    scores = np.sort(rng.uniform(0.05, 1, n))[::-1]
    return boxes(xyxy, scores, rng.integers(0, n_categories, n))


def row(
    image_id: str,
    shard_id: str = "0" * 16,
    detections: Detections | None = None,
    *,
    status: str = "ok",
    error: str | None = None,
    size: tuple[int, int] = (640, 480),
    offset: int | None = 0,
    nbytes: int = 1000,
    frames: int | None = 1,
    warning: str | None = None,
) -> AnnotationRow:
    """Return a row; ``size`` is (width, height)."""
    ok = status == "ok"
    return AnnotationRow(
        image_id=image_id,
        shard_id=shard_id,
        offset=offset,
        nbytes=nbytes,
        sha256="cd" * 32,
        phash=2**63 + 1 if ok else None,
        width=size[0] if ok else 0,
        height=size[1] if ok else 0,
        exif_orientation=1 if ok else 0,
        status=status,  # type: ignore[arg-type]  # tests also give wrong ones
        error=error if error is not None or ok else "cannot be read",
        detections=detections if detections is not None else Detections.empty(3),
        frames=frames if ok else None,
        warning=warning,
    )


def tar_shard(key: str, nbytes: int = 10_000, etag: str = "1") -> Shard:
    """Return a shard that is one tar."""
    return _shard("tar", [StoredObject(key, nbytes, etag)])


def image_shard(*keys: str, nbytes: int = 1000, etag: str = "1") -> Shard:
    """Return a shard of loose images."""
    return _shard("images", [StoredObject(key, nbytes, etag) for key in sorted(keys)])


def _shard(kind: str, objects: list[StoredObject]) -> Shard:
    return Shard(shard_id_of(objects), kind, tuple(objects))  # type: ignore[arg-type]


def commit_rows(
    manifest: Manifest,
    shard: Shard,
    rows: Iterable[AnnotationRow],
    *,
    attempt: str = "a1",
    seconds: dict[str, float] | None = None,
) -> None:
    """Commit rows as the shard's annotation object; their ``shard_id`` is taken as it is."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Path(folder) / "rows.parquet"
        writer = RowWriter(spool, manifest.record.identity)
        for one in rows:
            writer.write(one)
        manifest.commit(writer.finish(shard.shard_id, shard.key, attempt, seconds=seconds), spool)


def list_shards(store: ObjectStore, shards: Sequence[Shard]) -> None:
    """Write a listing in which exactly these shards are live."""
    by_object = {o.key: shard for shard in shards for o in shard.objects}
    listed = sorted((o for s in shards for o in s.objects), key=lambda o: o.key)

    def group(fresh: Iterable[StoredObject]) -> Iterable[Shard]:
        # By id: a shard's own hash takes each of its objects, for each of its objects.
        found = (by_object[o.key] for o in fresh)
        return {shard.shard_id: shard for shard in found}.values()

    Listing(store).refresh(listed, lambda fresh: iter(group(fresh)))


def make_run(
    store: ObjectStore,
    labelled: Mapping[Shard, Sequence[AnnotationRow]],
    *,
    unlabelled: Sequence[Shard] = (),
    classes: Sequence[str] = CLASSES,
    source: str = "memory://nowhere",
) -> Manifest:
    """Return a run with these shards listed, and rows committed for the labelled ones."""
    manifest = Manifest.create_or_continue(store, record(classes, source))
    list_shards(store, [*labelled, *unlabelled])
    for shard, rows in labelled.items():
        commit_rows(manifest, shard, rows)
    return manifest

"""verify --source: the images are read again, and compared with what their rows say of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from storage.errors import ObjectChanged, ObjectNotFound, SourceError, SourceTruncated
from storage.parquet.files import opened
from storage.records import ImageRecord, Shard, image_id_of, image_ids_of
from storage.runs.annotation_check import some
from storage.shards.frames import file_id, frames_labelled
from storage.shards.reading import SupportsShards, read_shard
from workers.images.decode import probe
from workers.images.frames import frames_of

_MOST_NBYTES, _MOST_PIXELS = 1 << 31, 1 << 29
_COLUMNS = ["image_id", "status", "sha256", "nbytes", "offset", "width", "height"]
Row = dict[str, Any]


@dataclass(slots=True)
class SourceCheck:
    """What the images of one shard say about its rows.

    Attributes:
        is_tar_reread: whether a tar was read to its end.
        hashed: images whose bytes were compared.
        changed: images that changed since they were listed, which prove nothing.
        problems: sentences.
    """

    is_tar_reread: bool = False
    hashed: int = 0
    changed: int = 0
    problems: list[str] = field(default_factory=list)


def check_against_source(
    raw: bytes,
    key: str,
    shard: Shard,
    source: SupportsShards,
    dropped: Set[str],
    inference: Mapping[str, Any],
) -> SourceCheck:
    """Read a shard's images again.

    Args:
        raw: its annotation object, readable. ``key``: for messages.
        shard: as it was listed.
        source: where its images lie.
        dropped: keys of its objects that a later listing tombstoned; their images may be others.
        inference: the run's settings: larger images than ``max_image_bytes`` were not labelled.

    Raises:
        StorageError: the source cannot be reached.
    """
    check = SourceCheck()
    rows = _rows(raw, key)
    if shard.kind == "tar" and rows.keys() in [{name} for name in image_ids_of(shard.key)]:
        check.changed += 1  # it was gone when it was to be labelled
        return check
    rows = _as_of_now(rows, shard)
    gone = {image_id_of(object_key) for object_key in dropped}
    framed = bool(frames_labelled(inference))
    seen: list[str] = []
    unread: set[str] = set()  # files that are gone now: which further frames they had is unknown
    wrong: dict[str, list[str]] = {}
    try:
        for image in _images(source, shard, inference):
            seen.append(image.image_id)
            if image.status == "missing":
                unread.add(image.image_id)
            row = rows.get(image.image_id)
            if row is None:
                continue
            file = file_id(image.image_id) if framed else image.image_id
            if file in gone or "missing" in (image.status, row["status"]):
                check.changed += 1
                continue
            check.hashed += image.data is not None
            for what in _differences(row, image):
                wrong.setdefault(what, []).append(image.image_id)
    except SourceTruncated:
        pass  # what came before its end is what there was to label
    except (ObjectNotFound, ObjectChanged, SourceError):
        check.changed += len(rows) - len(seen)
        return check
    check.is_tar_reread = shard.kind == "tar"
    there = set(seen)
    names = [i for i in rows if i in there or not (framed and file_id(i) in unread)]
    check.problems += _about_ids(seen, names)
    check.problems += [f"{what}: {some(ids)}" for what, ids in wrong.items()]
    return check


def _images(
    source: SupportsShards, shard: Shard, inference: Mapping[str, Any]
) -> Iterator[ImageRecord]:
    """Yield the images of a shard as a run with these settings reads them."""
    nbytes = inference.get("max_image_bytes") or _MOST_NBYTES
    pixels, most = inference.get("max_pixels") or _MOST_PIXELS, frames_labelled(inference)
    frames = frames_of(most, pixels) if most else None
    return read_shard(source, shard, max_image_bytes=nbytes, frames=frames)


def _about_ids(seen: Sequence[str], rows: Sequence[str]) -> Iterator[str]:
    """Yield what differs between the images of the source and the rows, by id and order."""
    there, known = set(seen), set(rows)
    if lacking := [image_id for image_id in seen if image_id not in known]:
        yield f"images of the shard that have no row: {some(lacking)}"
    if extra := [image_id for image_id in rows if image_id not in there]:
        yield f"images that are not of the shard: {some(extra)}"
    if not lacking and not extra and list(seen) != list(rows):
        yield "its rows are not in the order of the shard"


def _rows(raw: bytes, key: str) -> dict[str, Row]:
    with opened(raw, key) as file:
        table: pa.Table = file.read(columns=_COLUMNS)
        return {row["image_id"]: row for row in table.to_pylist()}


def _as_of_now(rows: dict[str, Row], shard: Shard) -> dict[str, Row]:
    """Return the rows by the ids that this version gives, where an older one gave others."""
    if shard.kind == "tar":
        return rows
    several = [ids for o in shard.objects if len(ids := image_ids_of(o.key)) > 1]
    now = {earlier: ids[0] for ids in several for earlier in ids[1:]}
    return {(image_id if now.get(image_id) in rows else now.get(image_id, image_id)): row
            for image_id, row in rows.items()} if now else rows  # fmt: skip


def _differences(row: Row, image: ImageRecord) -> Iterator[str]:
    """Yield what a row says otherwise than the image."""
    if image.data is None:
        return
    if row["nbytes"] != image.nbytes:
        yield "the source has another size in bytes than the row"
    if row["offset"] != image.offset:
        yield "the source has it at another offset than the row"
    if row["sha256"] and row["sha256"] != hashlib.sha256(image.data).hexdigest():
        yield "the source has other bytes than the row's sha256"
    if not row["sha256"] and row["status"] == "ok":
        yield "the row has no sha256"
    size = probe(image.data) if row["status"] == "ok" else None
    if size is not None and size[:2] != (row["width"], row["height"]):
        yield "the source has another width or height than the row"

"""The annotation Parquet: one row an image, one object a shard; the object is the commit.

Schema version 1. File metadata holds one JSON under the key ``labelfleet``: schema version, run
identity, categories with official ids, box convention, runtime and precision, the shard, the
attempt, and counts per status. Detections are a list of structs; boxes are xyxy in pixels of the
upright image. ``RowWriter`` streams rows to a spool file in row groups, so that memory does not
grow with the shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import StorageError
from storage.records import STATUSES, AnnotationRow, Detections

SCHEMA_VERSION = 1
METADATA_KEY = b"labelfleet"
ROW_GROUP_ROWS = 512

DETECTION_TYPE = pa.struct(
    [
        pa.field("bbox", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("category_id", pa.int16(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("topk_ids", pa.list_(pa.int16()), nullable=False),
        pa.field("topk_scores", pa.list_(pa.float32()), nullable=False),
        pa.field("box_std", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("box_entropy", pa.float32(), nullable=False),
        pa.field("anchor", pa.int32(), nullable=False),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.uint64()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("exif_orientation", pa.int8(), nullable=False),
        pa.field("status", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("error", pa.string()),
        pa.field("detections", pa.list_(pa.field("element", DETECTION_TYPE, nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Category:
    """A class: ``id`` contiguous as in the rows, ``official_id`` as in the data set (COCO's gaps)."""

    id: int
    name: str
    official_id: int


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What every annotation object says about the run that made it."""

    name: str
    config_hash: str
    model_sha256: str
    licence: str
    runtime: str
    precision: str
    code_version: str
    categories: tuple[Category, ...]


@dataclass(frozen=True, slots=True)
class ShardFooter:
    """The footer of one annotation object.

    Attributes:
        shard_id, shard_key: which shard.
        attempt: id of the attempt that wrote it, unique; tells a lost reply from a rival.
        counts: rows per status, every status named.
        detections: boxes over all rows.
        source_truncated: the tar ended in the middle; the rows before it are here.
        seconds: per stage, as the worker measured them.
    """

    shard_id: str
    shard_key: str
    attempt: str
    counts: dict[str, int]
    detections: int
    source_truncated: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """All rows."""
        return sum(self.counts.values())


def _fixed4(values: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), 4)


def _ragged(values: np.ndarray[Any, Any], kind: pa.DataType) -> pa.ListArray:
    n, k = values.shape
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * k)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).reshape(-1), kind))


def rows_to_table(rows: Sequence[AnnotationRow]) -> pa.Table:
    """Rows to an Arrow table in ``SCHEMA``; the inverse of ``table_to_rows``."""
    detections = [row.detections for row in rows]
    width = max((d.topk_ids.shape[1] for d in detections if len(d)), default=1)
    parts = [d for d in detections if len(d)] or [Detections.empty(width)]
    struct = pa.StructArray.from_arrays(
        [
            _fixed4(np.concatenate([d.boxes for d in parts])),
            pa.array(np.concatenate([d.category_ids for d in parts]), pa.int16()),
            pa.array(np.concatenate([d.scores for d in parts]), pa.float32()),
            _ragged(np.concatenate([d.topk_ids for d in parts]), pa.int16()),
            _ragged(np.concatenate([d.topk_scores for d in parts]), pa.float32()),
            _fixed4(np.concatenate([d.box_std for d in parts])),
            pa.array(np.concatenate([d.box_entropy for d in parts]), pa.float32()),
            pa.array(np.concatenate([d.anchor for d in parts]), pa.int32()),
        ],
        fields=list(DETECTION_TYPE),
    )
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(d) for d in detections], out=offsets[1:])
    columns = [
        pa.array([r.image_id for r in rows], pa.string()),
        pa.array([r.shard_id for r in rows], pa.string()),
        pa.array([r.offset for r in rows], pa.int64()),
        pa.array([r.nbytes for r in rows], pa.int64()),
        pa.array([r.sha256 for r in rows], pa.string()),
        pa.array([r.phash for r in rows], pa.uint64()),
        pa.array([r.width for r in rows], pa.int32()),
        pa.array([r.height for r in rows], pa.int32()),
        pa.array([r.exif_orientation for r in rows], pa.int8()),
        pa.DictionaryArray.from_arrays(
            pa.array([STATUSES.index(r.status) for r in rows], pa.int8()), pa.array(STATUSES)
        ),
        pa.array([r.error for r in rows], pa.string()),
        pa.ListArray.from_arrays(
            pa.array(offsets), struct, type=SCHEMA.field("detections").type
        ),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)

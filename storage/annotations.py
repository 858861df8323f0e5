"""The annotation Parquet: one row an image, one object a shard; the object is the commit.

Schema version 1. File metadata holds one JSON under the key ``labelfleet``: schema version, run
identity, categories with official ids, box convention, runtime and precision, the shard, the
attempt, and counts per status. Detections are a list of structs; boxes are xyxy in pixels of the
upright image. ``RowWriter`` streams rows to a spool file in row groups, so that memory does not
grow with the shard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import InvalidRow, StorageError
from storage.objects import SupportsGet, SupportsGetRange
from storage.records import STATUSES, AnnotationRow, Detections, StoredObject

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
        pa.field(
            "detections",
            pa.list_(pa.field("element", DETECTION_TYPE, nullable=False)),
            nullable=False,
        ),
    ]
)


@dataclass(frozen=True, slots=True)
class Category:
    """A class: ``id`` contiguous, as in the rows; ``official_id`` the data set's (may have gaps)."""

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
    return pa.ListArray.from_arrays(
        offsets, pa.array(np.ascontiguousarray(values).reshape(-1), kind)
    )


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
        pa.ListArray.from_arrays(pa.array(offsets), struct, type=SCHEMA.field("detections").type),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def table_to_rows(table: pa.Table) -> Iterator[AnnotationRow]:
    """Arrow table in ``SCHEMA`` back to rows."""
    table = table.combine_chunks()
    if table.num_rows == 0:
        return
    detections = table.column("detections").chunk(0)
    offsets = detections.offsets.to_numpy()
    struct = detections.values
    arrays = {name: struct.field(name) for name in struct.type.names}
    boxes = _matrix(arrays["bbox"], len(struct), 4)
    box_std = _matrix(arrays["box_std"], len(struct), 4)
    topk_ids = _matrix(arrays["topk_ids"], len(struct))
    topk_scores = _matrix(arrays["topk_scores"], len(struct))
    flat = {n: arrays[n].to_numpy() for n in ("score", "category_id", "box_entropy", "anchor")}
    plain = table.drop_columns(["detections"]).to_pylist()
    for i, values in enumerate(plain):
        at = slice(int(offsets[i]), int(offsets[i + 1]))
        yield AnnotationRow(
            **values,
            detections=Detections(
                boxes=boxes[at],
                scores=flat["score"][at],
                category_ids=flat["category_id"][at],
                topk_ids=topk_ids[at],
                topk_scores=topk_scores[at],
                box_std=box_std[at],
                box_entropy=flat["box_entropy"][at],
                anchor=flat["anchor"][at],
            ),
        )


def _matrix(array: pa.Array, n: int, width: int | None = None) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = array.flatten().to_numpy()
    return values.reshape(n, width if width is not None else (len(values) // n if n else 1))


def validate_row(row: AnnotationRow, n_categories: int) -> None:
    """Refuse a row that a reader could not trust; the shard's attempt fails with the reason.

    Raises:
        InvalidRow: naming the image and what is wrong with its row.
    """
    d = row.detections
    where = f"{row.image_id!r} in shard {row.shard_id}"
    if row.status not in STATUSES:
        raise InvalidRow(f"{where}: unknown status {row.status!r}")
    if (row.status == "ok") != (row.error is None):
        raise InvalidRow(f"{where}: status {row.status} with error {row.error!r}")
    if row.status == "ok" and (row.width < 1 or row.height < 1):
        raise InvalidRow(f"{where}: status ok without a size")
    if row.status != "ok" and len(d):
        raise InvalidRow(f"{where}: {len(d)} detections on an image of status {row.status}")
    if not len(d):
        return
    _validate_shapes(d, where)
    for name in ("boxes", "box_std", "box_entropy", "topk_scores"):
        if not np.isfinite(getattr(d, name)).all():
            raise InvalidRow(f"{where}: {name} is not finite")
    if not ((d.scores >= 0) & (d.scores <= 1)).all():
        raise InvalidRow(f"{where}: a score outside [0, 1]")
    x1, y1, x2, y2 = d.boxes.T
    if (x1 > x2).any() or (y1 > y2).any():
        raise InvalidRow(f"{where}: a box with negative extent")
    # A box may reach past the border of its image, as the network drew it; readers clip.
    if (d.category_ids < 0).any() or (d.category_ids >= n_categories).any():
        raise InvalidRow(f"{where}: a category id outside 0..{n_categories - 1}")


def _validate_shapes(d: Detections, where: str) -> None:
    n, k = len(d), d.topk_ids.shape[-1]
    shapes = {
        "boxes": (n, 4), "category_ids": (n,), "topk_ids": (n, k), "topk_scores": (n, k),
        "box_std": (n, 4), "box_entropy": (n,), "anchor": (n,),
    }  # fmt: skip
    for name, shape in shapes.items():
        if (found := getattr(d, name).shape) != shape:
            raise InvalidRow(f"{where}: {name} has shape {found}, not {shape}")


class RowWriter:
    """Streams one shard's rows to a local spool file; ``finish`` adds the footer and closes.

    Rows are validated and held only until a row group is full, so memory does not grow with the
    shard. The spool file is the body of the one conditional put that commits the shard.
    """

    def __init__(self, spool: Path, run: RunIdentity) -> None:
        self._run = run
        self._rows: list[AnnotationRow] = []
        self._counts: dict[str, int] = dict.fromkeys(STATUSES, 0)
        self._detections = 0
        self._writer = pq.ParquetWriter(spool, SCHEMA, compression="zstd")

    def write(self, row: AnnotationRow) -> None:
        """Add one row. Raises InvalidRow (see ``validate_row``)."""
        validate_row(row, len(self._run.categories))
        self._rows.append(row)
        self._counts[row.status] += 1
        self._detections += len(row.detections)
        if len(self._rows) >= ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            table = rows_to_table(self._rows)
            table.validate(full=True)
            self._writer.write_table(table)
            self._rows.clear()

    def finish(
        self,
        shard_id: str,
        shard_key: str,
        attempt: str,
        *,
        source_truncated: str | None = None,
        seconds: dict[str, float] | None = None,
    ) -> ShardFooter:
        """Write what is buffered and the footer; the spool file is complete afterwards."""
        self._flush()
        footer = ShardFooter(
            shard_id, shard_key, attempt, dict(self._counts), self._detections,
            source_truncated, seconds or {},
        )  # fmt: skip
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "box": "xyxy, pixels of the upright image",
            "run": asdict(self._run),
            "shard": asdict(footer),
        }
        self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(metadata)})
        self._writer.close()
        return footer

    def abandon(self) -> None:
        """Close without a footer; the spool file is not to be used."""
        self._rows.clear()
        self._writer.close()


class _RangedFile(io.RawIOBase):
    """An object as a seekable file, so that pyarrow fetches a footer without the rest."""

    def __init__(self, store: SupportsGetRange, listed: StoredObject) -> None:
        super().__init__()
        self._store, self._listed, self._at = store, listed, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._listed.nbytes}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._listed.nbytes - self._at)
        size = left if size is None or size < 0 else min(size, left)
        chunk = self._store.get_range(self._listed.key, self._at, size) if size else b""
        self._at += len(chunk)
        return chunk


@contextmanager
def _opened(source: pa.NativeFile, key: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what pyarrow says of a damaged one becomes StorageError with the key."""
    try:
        with pq.ParquetFile(source) as file:
            yield file
    except (pa.ArrowException, OSError) as exc:
        raise StorageError(
            f"{key} is not a readable Parquet file: {exc}",
            hint="it was damaged or put there by something else; move it away and run again",
        ) from exc


def _metadata_of(file: pq.ParquetFile, key: str) -> dict[str, Any]:
    # The footer's own key-value pairs; the Arrow schema inside it does not repeat them.
    raw = (file.metadata.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise StorageError(
            f"{key} is a Parquet file, but not one that labelfleet wrote",
            hint="something else put it below annotations/; move it away",
        )
    metadata: dict[str, Any] = json.loads(raw)
    if metadata["schema_version"] > SCHEMA_VERSION:
        raise StorageError(
            f"{key} has schema version {metadata['schema_version']}, "
            f"this labelfleet reads up to {SCHEMA_VERSION}",
            hint="update labelfleet",
        )
    return metadata


def read_footer(store: SupportsGetRange, listed: StoredObject) -> ShardFooter:
    """The footer of one annotation object, by ranged reads of its end only.

    Raises:
        StorageError: not a Parquet file, or not one of ours.
    """
    ranged = pa.PythonFile(_RangedFile(store, listed), mode="r")
    with _opened(ranged, listed.key) as file:
        return ShardFooter(**_metadata_of(file, listed.key)["shard"])


def read_identity(store: SupportsGet, key: str) -> RunIdentity:
    """The run identity that an annotation object carries. Raises StorageError: not one of ours."""
    with _opened(pa.BufferReader(store.get(key)), key) as file:
        run = _metadata_of(file, key)["run"]
    categories = tuple(Category(**c) for c in run.pop("categories"))
    return RunIdentity(**run, categories=categories)


def read_tables(
    store: SupportsGet, key: str, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """One annotation object as Arrow tables, a row group at a time; ``columns`` None: all.

    Raises:
        ObjectNotFound: no such object.
        StorageError: not a Parquet file, or not one of ours.
    """
    with _opened(pa.BufferReader(store.get(key)), key) as file:
        _metadata_of(file, key)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns) if columns else None)


def read_rows(store: SupportsGet, key: str) -> Iterator[AnnotationRow]:
    """One annotation object as rows, in the order of the shard."""
    for table in read_tables(store, key):
        yield from table_to_rows(table)

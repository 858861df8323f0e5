"""Annotation rows as Arrow: schema, conversion both ways, and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import InvalidRow
from storage.records import STATUSES, AnnotationRow, Detections

DETECTION_TYPE = pa.struct(
    [
        pa.field("bbox", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("category_id", pa.int16(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("topk_ids", pa.list_(pa.int16()), nullable=False),
        pa.field("topk_scores", pa.list_(pa.float32()), nullable=False),
        # Since schema version 2: null if the detector is not a YOLO-NAS.
        pa.field("box_std", pa.list_(pa.float32(), 4)),
        pa.field("box_entropy", pa.float32()),
        pa.field("anchor", pa.int32()),
        # Since schema version 3: null except in fused runs; a run that did not vote is null inside.
        pa.field("run_scores", pa.list_(pa.float32())),
        pa.field("agreement", pa.float32()),
    ]
)

_NULLABLE = ("box_std", "box_entropy", "anchor", "run_scores", "agreement")

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
        # Since schema version 2; null in files of version 1.
        pa.field("frames", pa.int32()),
        pa.field("warning", pa.string()),
    ]
)


def with_missing_columns(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """Return a table as read from an older schema version with the newer columns, all null.

    Args:
        columns: the requested names; None: the whole schema.
    """
    names = SCHEMA.names if columns is None else columns
    for name in (n for n in names if n not in table.column_names and n in SCHEMA.names):
        if SCHEMA.field(name).nullable:
            field = SCHEMA.field(name)
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


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
    """Convert rows to an Arrow table in ``SCHEMA``; the inverse of ``table_to_rows``."""
    counts = [len(row.detections) for row in rows]
    parts = [row.detections for row, n in zip(rows, counts, strict=True) if n]
    parts = parts or [Detections.empty()]
    sizes = [n for n in counts if n] or [0]
    struct = pa.StructArray.from_arrays(
        [
            _fixed4(np.concatenate([d.boxes for d in parts])),
            pa.array(np.concatenate([d.category_ids for d in parts]), pa.int16()),
            pa.array(np.concatenate([d.scores for d in parts]), pa.float32()),
            _ragged(np.concatenate([d.topk_ids for d in parts]), pa.int16()),
            _ragged(np.concatenate([d.topk_scores for d in parts]), pa.float32()),
            _joined([d.box_std for d in parts], sizes, DETECTION_TYPE.field("box_std").type),
            _joined([d.box_entropy for d in parts], sizes, pa.float32()),
            _joined([d.anchor for d in parts], sizes, pa.int32()),
            _joined_votes([d.run_scores for d in parts], sizes),
            _joined([d.agreement for d in parts], sizes, pa.float32(), nan_is_null=True),
        ],
        fields=list(DETECTION_TYPE),
    )
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
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
        pa.array([r.frames for r in rows], pa.int32()),
        pa.array([r.warning for r in rows], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _joined(
    parts: Sequence[np.ndarray[Any, Any] | None],
    sizes: Sequence[int],
    kind: pa.DataType,
    *,
    nan_is_null: bool = False,
) -> pa.Array:
    """Concatenate the values of some rows' boxes, with nulls for rows without values."""
    known = [values for values in parts if values is not None]
    if not known:
        return pa.nulls(sum(sizes), kind)
    if len(known) == len(parts):
        whole = np.concatenate(known)
        if pa.types.is_fixed_size_list(kind):
            return _fixed4(whole)
        return pa.array(whole, kind, from_pandas=nan_is_null)
    arrays = []
    for values, count in zip(parts, sizes, strict=True):
        if values is None:
            arrays.append(pa.nulls(count, kind))
        elif pa.types.is_fixed_size_list(kind):
            arrays.append(_fixed4(values))
        else:
            arrays.append(pa.array(values, kind, from_pandas=nan_is_null))
    return pa.concat_arrays(arrays)


def _joined_votes(parts: Sequence[np.ndarray[Any, Any] | None], sizes: Sequence[int]) -> pa.Array:
    """Return ``run_scores`` of some rows: one list per box, null where a run did not vote."""
    if all(values is None for values in parts):
        return pa.nulls(sum(sizes), pa.list_(pa.float32()))
    arrays = []
    for values, count in zip(parts, sizes, strict=True):
        if values is None:
            arrays.append(pa.nulls(count, pa.list_(pa.float32())))
        else:
            offsets = np.arange(count + 1, dtype=np.int32) * values.shape[1]
            flat = pa.array(values.reshape(-1), pa.float32(), from_pandas=True)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), flat))
    return pa.concat_arrays(arrays)


def table_to_rows(table: pa.Table) -> Iterator[AnnotationRow]:
    """Yield the rows of an Arrow table in ``SCHEMA``."""
    table = table.combine_chunks()
    if table.num_rows == 0:
        return
    detections = table.column("detections").chunk(0)
    offsets = detections.offsets.to_numpy()
    struct = detections.values
    arrays = {name: struct.field(name) for name in struct.type.names}
    boxes = _matrix(arrays["bbox"], len(struct), 4)
    topk_ids = _matrix(arrays["topk_ids"], len(struct))
    topk_scores = _matrix(arrays["topk_scores"], len(struct))
    flat = {name: arrays[name].to_numpy() for name in ("score", "category_id")}
    plain = table.drop_columns(["detections"]).to_pylist()
    for i, values in enumerate(plain):
        at = slice(int(offsets[i]), int(offsets[i + 1]))
        votes = _votes(arrays.get("run_scores"), at)
        yield AnnotationRow(
            **values,
            detections=Detections(
                boxes=boxes[at],
                scores=flat["score"][at],
                category_ids=flat["category_id"][at],
                topk_ids=topk_ids[at],
                topk_scores=topk_scores[at],
                box_std=_known(arrays["box_std"], at, 4),
                box_entropy=_known(arrays["box_entropy"], at),
                anchor=_known(arrays["anchor"], at),
                run_scores=votes,
                agreement=None if votes is None else _agreement(arrays["agreement"], at),
            ),
        )


def _votes(array: pa.Array | None, at: slice) -> np.ndarray[Any, Any] | None:
    """Return one row's ``run_scores``; None in unfused runs and before schema version 3."""
    part = None if array is None else array.slice(at.start, at.stop - at.start)
    if part is None or not len(part) or part.null_count:
        return None
    flat: np.ndarray[Any, Any] = part.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(part), -1)


def _agreement(array: pa.Array, at: slice) -> np.ndarray[Any, Any]:
    """Return one row's ``agreement``, NaN where it is null."""
    part = array.slice(at.start, at.stop - at.start)
    values: np.ndarray[Any, Any] = part.to_numpy(zero_copy_only=False)
    return values.astype(np.float32)


def _known(array: pa.Array, at: slice, width: int | None = None) -> np.ndarray[Any, Any] | None:
    """Return one row's values; None if they are null."""
    part = array.slice(at.start, at.stop - at.start)
    if part.null_count:
        return None
    if width is not None:
        return _matrix(part, len(part), width)
    values: np.ndarray[Any, Any] = part.to_numpy()
    return values


def _matrix(array: pa.Array, n: int, width: int | None = None) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = array.flatten().to_numpy()
    return values.reshape(n, width if width is not None else (len(values) // n if n else 1))


def validate_rows(rows: Sequence[AnnotationRow], n_categories: int) -> None:
    """Do what ``validate_row`` does for each row, with one look at the arrays of all of them.

    Raises:
        InvalidRow: names the first image with an impossible row, and the problem.
    """
    found = [row.detections for row in rows if len(row.detections)]
    for row in rows:
        _validate_fields(row)
    if found and not _plausible(found, n_categories):
        for row in rows:
            validate_row(row, n_categories)


def _plausible(found: Sequence[Detections], n_categories: int) -> bool:
    """Return whether all values are possible; if not, some row's are not, or it is unclear."""
    if not all(_fits(d) for d in found):
        return False
    boxes = np.concatenate([d.boxes for d in found])
    scores = np.concatenate([d.scores for d in found])
    ids = np.concatenate([d.category_ids for d in found])
    others = [d.topk_scores.reshape(-1) for d in found]
    others += [d.box_std.reshape(-1) for d in found if d.box_std is not None]
    others += [d.box_entropy.reshape(-1) for d in found if d.box_entropy is not None]
    return (
        all(d.run_scores is None and d.agreement is None for d in found)
        and bool(np.isfinite(boxes).all())
        and bool((boxes[:, :2] <= boxes[:, 2:]).all())
        and bool(((scores >= 0) & (scores <= 1)).all())
        and 0 <= int(ids.min()) <= int(ids.max()) < n_categories
        and bool(np.isfinite(np.concatenate(others)).all())
    )


def _fits(d: Detections) -> bool:
    n = d.scores.shape
    four, k = (*n, 4), (*n, d.topk_ids.shape[-1])
    return (
        len(n) == 1
        and d.boxes.shape == four
        and d.category_ids.shape == n
        and d.topk_ids.shape == d.topk_scores.shape == k
        and (d.box_std is None or d.box_std.shape == four)
        and (d.box_entropy is None or d.box_entropy.shape == n)
        and (d.anchor is None or d.anchor.shape == n)
    )


def _validate_fields(row: AnnotationRow) -> None:
    """Refuse a row whose status contradicts its other fields; see ``validate_row``."""
    boxes = len(row.detections)
    if row.status not in STATUSES:
        raise InvalidRow(f"{_where(row)}: unknown status {row.status!r}")
    if (row.status == "ok") != (row.error is None):
        raise InvalidRow(f"{_where(row)}: status {row.status} with error {row.error!r}")
    if row.status == "ok" and (row.width < 1 or row.height < 1):
        raise InvalidRow(f"{_where(row)}: status ok without a size")
    if row.status != "ok" and boxes:
        raise InvalidRow(f"{_where(row)}: {boxes} detections on an image of status {row.status}")


def validate_row(row: AnnotationRow, n_categories: int) -> None:
    """Refuse a row with impossible values; the shard's attempt fails with the reason.

    Raises:
        InvalidRow: names the image and the problem with its row.
    """
    _validate_fields(row)
    d = row.detections
    if not len(d):
        return
    where = _where(row)
    _validate_shapes(d, where)
    for name in ("boxes", "box_std", "box_entropy", "topk_scores"):
        values = getattr(d, name)
        if values is not None and not np.isfinite(values).all():
            raise InvalidRow(f"{where}: {name} is not finite")
    if not ((d.scores >= 0) & (d.scores <= 1)).all():
        raise InvalidRow(f"{where}: a score outside [0, 1]")
    if d.agreement is not None and ((d.agreement < 0) | (d.agreement > 1)).any():
        raise InvalidRow(f"{where}: an agreement outside [0, 1]")
    x1, y1, x2, y2 = d.boxes.T
    if (x1 > x2).any() or (y1 > y2).any():
        raise InvalidRow(f"{where}: a box with negative extent")
    # A box may reach past the border of its image, as the network drew it; readers clip.
    if (d.category_ids < 0).any() or (d.category_ids >= n_categories).any():
        raise InvalidRow(f"{where}: a category id outside 0..{n_categories - 1}")


def _where(row: AnnotationRow) -> str:
    return f"{row.image_id!r} in shard {row.shard_id}"


def _validate_shapes(d: Detections, where: str) -> None:
    n, k = len(d), d.topk_ids.shape[-1]
    shapes = {
        "boxes": (n, 4), "category_ids": (n,), "topk_ids": (n, k), "topk_scores": (n, k),
        "box_std": (n, 4), "box_entropy": (n,), "anchor": (n,), "agreement": (n,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = getattr(d, name)
        if values is None and name in _NULLABLE:
            continue
        if (found := values.shape) != shape:
            raise InvalidRow(f"{where}: {name} has shape {found}, not {shape}")
    if d.run_scores is not None and (d.run_scores.ndim != 2 or len(d.run_scores) != n):
        raise InvalidRow(f"{where}: run_scores has shape {d.run_scores.shape}, not ({n}, runs)")


def untrue_values(table: pa.Table, n_categories: int) -> Iterator[str]:
    """Yield a sentence per kind of impossible value, as ``validate_row`` but by column."""
    ok = pc.equal(table.column("status").cast(pa.string()), "ok")
    for name in ("width", "height"):
        if pc.any(pc.and_(ok, pc.less(table.column(name), 1))).as_py():
            yield f"images with status ok and without a {name}"
    if pc.any(pc.less(table.column("nbytes"), 0)).as_py():
        yield "images with a negative size in bytes"
    is_digest = pc.match_substring_regex(table.column("sha256"), "^([0-9a-f]{64})?$")
    if not pc.all(is_digest).as_py():
        yield "a malformed sha256"
    boxed = pc.greater(pc.list_value_length(table.column("detections")), 0)
    if pc.any(pc.and_(boxed, pc.invert(ok))).as_py():
        yield "boxes on images whose status is not ok"
    flat = pc.list_flatten(table.column("detections")).combine_chunks()
    if not len(flat):
        return
    scores = np.asarray(pc.struct_field(flat, "score"))
    if not ((scores >= 0) & (scores <= 1)).all():
        yield "a score outside [0, 1]"
    ids = np.asarray(pc.struct_field(flat, "category_id"))
    if (ids < 0).any() or (ids >= n_categories).any():
        yield f"a category id outside 0..{n_categories - 1}"
    if flat.type.get_field_index("agreement") >= 0:
        agreement = pc.struct_field(flat, "agreement").drop_null().to_numpy(zero_copy_only=False)
        if not ((agreement >= 0) & (agreement <= 1)).all():
            yield "an agreement outside [0, 1]"
    corners = np.asarray(pc.list_flatten(pc.struct_field(flat, "bbox"))).reshape(-1, 4)
    x1, y1, x2, y2 = corners.T
    if not (np.isfinite(corners).all() and (x1 <= x2).all() and (y1 <= y2).all()):
        yield "a box that is not finite, or has a negative extent"

"""Hugging Face: Parquet with ``image`` and ``objects`` features that ``load_dataset`` understands.

``load_dataset("parquet", data_files="DEST/data/*.parquet")`` gives decoded images (where they were
copied or linked) and class names; pandas, DuckDB and Polars read the same files. Boxes are COCO's
``[x, y, width, height]`` in pixels, the convention of the hub's detection sets. Ignore boxes are in
``ignored``, and among ``objects`` only where that is asked for.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.exports.formats import ExportedImages, IgnoreBoxes, provenance
from pipelines.exports.place import ExportPlace
from storage.labels.versions import LabelVersion
from storage.objects.os_errors import temporary_folder, translating_os_errors

_BUFFERED_BYTES = 64 * 1024 * 1024
_PART_BYTES = 512 * 1024 * 1024
_COPIED = ("image_id", "width", "height", "source", "annotator", "labelled_at")

_OBJECTS = pa.struct(
    [
        pa.field("bbox", pa.list_(pa.list_(pa.float32(), 4))),
        pa.field("category", pa.list_(pa.int64())),
        pa.field("score", pa.list_(pa.float32())),
        pa.field("ignore", pa.list_(pa.bool_())),
    ]
)
_FIELDS = [
    pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    pa.field("image_id", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("source", pa.string()),
    pa.field("annotator", pa.string()),
    pa.field("labelled_at", pa.timestamp("us", tz="UTC")),
    pa.field("objects", _OBJECTS),
    pa.field("ignored", _OBJECTS),
]


class HfExporter:
    """Writes data/part-<n>.parquet; at most one row group of images is in memory."""

    def __init__(
        self, place: ExportPlace, lineage: LabelVersion, ignore_boxes: IgnoreBoxes
    ) -> None:
        self._place, self._lineage, self._ignore_boxes = place, lineage, ignore_boxes
        features = _features([c.name for c in lineage.categories])
        self._schema = pa.schema(_FIELDS).with_metadata(
            {
                "huggingface": json.dumps({"info": {"features": features}}),
                "labelfleet": json.dumps(provenance(lineage)),
            }
        )
        self._rows: list[pa.Table] = []
        self._buffered = self._in_part = self._parts = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> HfExporter:
        self._folder = temporary_folder()
        self._place.clear("data/")  # images come in no fixed order, so parts cannot be continued
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            with suppress(OSError):  # a full disk; the folder is deleted next
                self._writer.close()
        self._folder.cleanup()

    def add(self, images: ExportedImages) -> None:
        """Some images with their labels."""
        rows = _rows(images, self._ignore_boxes).cast(self._schema)
        self._rows.append(rows)
        self._buffered += rows.nbytes
        if self._buffered >= _BUFFERED_BYTES:
            self._flush()

    def close(self) -> None:
        """Ship what is left; an export without images has one empty part."""
        if self._rows or not self._parts:
            self._flush()
        self._ship()

    def _flush(self) -> None:
        with translating_os_errors(self._folder.name):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._spool, self._schema, compression="zstd")
            self._writer.write_table(pa.concat_tables(self._rows or [self._schema.empty_table()]))
        self._in_part += self._buffered
        self._rows, self._buffered = [], 0
        if self._in_part >= _PART_BYTES:
            self._ship()

    def _ship(self) -> None:
        if self._writer is None:
            return
        with translating_os_errors(self._folder.name):
            self._writer.close()
        self._place.write(f"data/part-{self._parts:05d}.parquet", self._spool)
        self._parts += 1
        self._writer, self._in_part = None, 0

    @property
    def _spool(self) -> Path:
        return Path(self._folder.name) / "part.parquet"


def _rows(images: ExportedImages, ignore_boxes: IgnoreBoxes) -> pa.Table:
    labels = images.rows.column("labels").combine_chunks()
    ignored = labels.flatten().field("ignore")
    every = pa.array(np.ones(len(ignored), np.bool_))
    kept = every if ignore_boxes == "in" else pc.invert(ignored)
    columns = {
        "image": _pictures(images),
        **{name: images.rows.column(name) for name in _COPIED},
        "objects": _objects(labels, kept),
        "ignored": _objects(labels, ignored),
    }
    return pa.table(columns)


def _pictures(images: ExportedImages) -> pa.Array:
    return pa.array(
        [
            None
            if picture is None
            else {"bytes": picture, "path": name}
            if isinstance(picture, bytes)
            else {"bytes": None, "path": str(picture)}
            for name, picture in zip(images.names, images.pictures, strict=True)
        ],
        _FIELDS[0].type,
    )


def _objects(labels: pa.ListArray, wanted: pa.BooleanArray) -> pa.StructArray:
    """Return the wanted boxes [N] of M images as the feature has them: a list a field, [M]."""
    box = labels.flatten()
    counts = np.asarray(labels.value_lengths())
    image = np.repeat(np.arange(len(labels)), counts)[np.asarray(wanted)]
    ends = np.cumsum(np.bincount(image, minlength=len(labels)))
    starts = pa.array(np.concatenate([[0], ends]), pa.int32())
    box = box.filter(wanted)
    corners = np.asarray(box.field("bbox").flatten(), np.float64).reshape(-1, 4)
    # In double precision, and rounded once, as it is where a box is computed alone.
    sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    bbox = pa.FixedSizeListArray.from_arrays(pa.array(sides.astype(np.float32).ravel()), 4)
    fields = (bbox, box.field("category_id").cast(pa.int64()), box.field("score"),
              box.field("ignore"))  # fmt: skip
    lists = [pa.ListArray.from_arrays(starts, values) for values in fields]
    return pa.StructArray.from_arrays(lists, fields=list(_OBJECTS))


def _features(names: list[str]) -> dict[str, Any]:
    def value(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "_type": "Value"}

    def sequence(feature: dict[str, Any], length: int = -1) -> dict[str, Any]:
        return {"feature": feature, "length": length, "_type": "Sequence"}

    objects = {
        "bbox": sequence(sequence(value("float32"), 4)),
        "category": sequence({"names": names, "_type": "ClassLabel"}),
        "score": sequence(value("float32")),
        "ignore": sequence(value("bool")),
    }
    return {
        "image": {"_type": "Image"},
        "image_id": value("string"),
        "width": value("int32"),
        "height": value("int32"),
        "source": value("string"),
        "annotator": value("string"),
        "labelled_at": value("timestamp[us, tz=UTC]"),
        "objects": objects,
        "ignored": objects,
    }

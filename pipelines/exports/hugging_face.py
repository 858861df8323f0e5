"""Hugging Face: Parquet with ``image`` and ``objects`` features that ``load_dataset`` understands.

``load_dataset("parquet", data_files="DEST/data/*.parquet")`` gives decoded images (where they were
copied or linked) and class names; pandas, DuckDB and Polars read the same files. Boxes are COCO's
``[x, y, width, height]`` in pixels, the convention of the hub's detection sets. Ignore boxes are in
``ignored``, and among ``objects`` only where that is asked for.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.exports.formats import ExportedImage, IgnoreBoxes, provenance, split_labels
from pipelines.exports.place import ExportPlace
from storage.labels.rows import Label
from storage.labels.versions import LabelVersion

_BUFFERED_BYTES = 64 * 1024 * 1024
_PART_BYTES = 512 * 1024 * 1024
_ROW_BYTES = 512  # about what a row takes besides its image

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
        self._rows: list[dict[str, Any]] = []
        self._buffered = self._in_part = self._parts = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> HfExporter:
        self._folder = tempfile.TemporaryDirectory(prefix="labelfleet-")
        self._place.clear("data/")  # images come in no fixed order, so parts cannot be continued
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        self._folder.cleanup()

    def add(self, image: ExportedImage) -> None:
        """One image with its labels."""
        self._rows.append(_row(image, self._ignore_boxes))
        self._buffered += _ROW_BYTES + len(image.raw or b"")
        if self._buffered >= _BUFFERED_BYTES:
            self._flush()

    def close(self) -> None:
        """Ship what is left; an export without images has one empty part."""
        if self._rows or not self._parts:
            self._flush()
        self._ship()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._spool, self._schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._in_part += self._buffered
        self._rows, self._buffered = [], 0
        if self._in_part >= _PART_BYTES:
            self._ship()

    def _ship(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._place.write(f"data/part-{self._parts:05d}.parquet", self._spool)
        self._parts += 1
        self._writer, self._in_part = None, 0

    @property
    def _spool(self) -> Path:
        return Path(self._folder.name) / "part.parquet"


def _row(image: ExportedImage, ignore_boxes: IgnoreBoxes) -> dict[str, Any]:
    row = image.row
    kept, ignored = split_labels(row.labels, ignore_boxes)
    if image.raw is None and image.link is None:
        picture = None
    else:
        path = image.name if image.link is None else str(image.link)
        picture = {"bytes": image.raw, "path": path}
    return {
        "image": picture,
        "image_id": row.image_id,
        "width": row.width,
        "height": row.height,
        "source": row.source,
        "annotator": row.annotator,
        "labelled_at": row.labelled_at,
        "objects": _objects(kept),
        "ignored": _objects(ignored),
    }


def _objects(labels: list[Label]) -> dict[str, Any]:
    return {
        "bbox": [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (x.bbox for x in labels)],
        "category": [x.category_id for x in labels],
        "score": [x.score for x in labels],
        "ignore": [x.ignore for x in labels],
    }


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

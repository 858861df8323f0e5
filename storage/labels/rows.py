"""Rows of a label version: the record, its conversion to and from Arrow, and a writer of parts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.labels.versions import LABEL_SCHEMA, LABELS, PartFile, part_metadata, sha256_of
from storage.objects.protocols import SupportsCreate
from storage.parquet.files import SealedWriter
from storage.records import ImageRef, Xyxy

ROWS_PER_PART = 100_000
LabelSource = Literal["model", "human"]


@dataclass(frozen=True, slots=True)
class Label:
    """One box of a label version; ``score`` None: a person drew it."""

    bbox: Xyxy
    category_id: int
    score: float | None
    ignore: bool
    origin: str


@dataclass(frozen=True, slots=True)
class LabelRow(ImageRef):
    """One image of a label version; fields are those of ``LABEL_SCHEMA``."""

    width: int
    height: int
    source: LabelSource
    labels: tuple[Label, ...]
    rejected: int
    model: str
    policy: str
    annotator: str | None
    labelled_at: datetime

    @property
    def accepted(self) -> tuple[Label, ...]:
        """Labels that are not ignore boxes."""
        return tuple(label for label in self.labels if not label.ignore)


def rows_to_label_table(rows: Sequence[LabelRow]) -> pa.Table:
    """Return rows as an Arrow table in ``LABEL_SCHEMA``."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=LABEL_SCHEMA)


def label_rows(table: pa.Table) -> Iterator[LabelRow]:
    """Yield the rows of an Arrow table in ``LABEL_SCHEMA``."""
    for row in table.to_pylist():
        labels = tuple(
            Label(**{**label, "bbox": tuple(label["bbox"])}) for label in row.pop("labels")
        )
        yield LabelRow(**row, labels=labels)


def labels_array(
    counts: NDArray[np.int64],
    boxes: NDArray[np.float32],
    category_ids: NDArray[np.int16],
    scores: NDArray[np.float32],
    ignore: NDArray[np.bool_],
) -> pa.ListArray:
    """Return the ``labels`` column for model boxes: ``counts`` [M] boxes per image, flat arrays."""
    kind = LABEL_SCHEMA.field("labels").type
    flat = np.ascontiguousarray(boxes, np.float32).reshape(-1)
    struct = pa.StructArray.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), 4),
            pa.array(category_ids, pa.int16()),
            pa.array(scores, pa.float32()),
            pa.array(ignore, pa.bool_()),
            pa.array(np.full(len(scores), "model"), pa.string()),
        ],
        fields=list(kind.value_type),
    )
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=kind)


class LabelWriter:
    """Streams tables into the parts of one version; memory does not grow with the run.

    Use as a context manager; ``close`` writes the last part and returns all of them.
    """

    def __init__(
        self,
        store: SupportsCreate,
        version: str,
        header: dict[str, Any],
        *,
        rows_per_part: int = ROWS_PER_PART,
    ) -> None:
        self._store, self._version = store, version
        self._header = part_metadata({"version": version, **header})
        self._rows_per_part = rows_per_part
        self._folder = tempfile.TemporaryDirectory(prefix="labelfleet-")
        self._writer: SealedWriter | None = None
        self._rows = 0
        self._parts: list[PartFile] = []

    def __enter__(self) -> LabelWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.abandon()
        self._folder.cleanup()

    def write(self, table: pa.Table) -> None:
        """Add rows, in ``LABEL_SCHEMA``."""
        if not table.num_rows:
            return
        if self._writer is None:
            self._writer = SealedWriter(self._spool, LABEL_SCHEMA)
        self._writer.write(table.cast(LABEL_SCHEMA))
        self._rows += table.num_rows
        if self._rows >= self._rows_per_part:
            self._ship(self._writer)

    def close(self) -> tuple[PartFile, ...]:
        """Write the remaining rows; a version without rows gets one empty part to carry its
        schema."""
        if self._rows == 0 and not self._parts:
            self._writer = SealedWriter(self._spool, LABEL_SCHEMA)
        if self._writer is not None:
            self._ship(self._writer)
        return tuple(self._parts)

    @property
    def _spool(self) -> Path:
        return Path(self._folder.name) / "part.parquet"

    def _ship(self, writer: SealedWriter) -> None:
        key = f"{LABELS}{self._version}/part-{len(self._parts):06d}.parquet"
        self._writer = None
        writer.finish({"key": key, **self._header})
        self._store.create(key, self._spool)
        self._parts.append(PartFile(key, self._rows, sha256_of(self._spool)))
        self._rows = 0

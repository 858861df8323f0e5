"""The annotation Parquet: one row per image, one object per shard; the object is the commit.

Schema version 3 (1 had neither ``frames`` nor ``warning``, 2 neither ``run_scores`` nor
``agreement``). File metadata holds one JSON under the
key ``labelfleet``: schema version, run identity, categories with official ids, box convention,
runtime and precision, the shard, the attempt, and counts per status. Detections are a list of
structs; boxes are xyxy in pixels of the upright image. ``RowWriter`` streams rows to a spool file
in row groups, so that memory does not grow with the shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.errors import InvalidRow
from storage.objects.protocols import SupportsGet, SupportsGetRange
from storage.parquet.errors import reading_parquet
from storage.parquet.files import SCHEMA_VERSION, SealedWriter, metadata_of, opened, read_metadata
from storage.records import (
    STATUSES,
    AnnotationRow,
    Category,
    RunIdentity,
    StoredObject,
    warning_kinds,
)
from storage.runs.annotation_rows import (
    SCHEMA,
    rows_to_table,
    table_to_rows,
    validate_rows,
    with_missing_columns,
)

ROW_GROUP_ROWS = 512
ROW_GROUP_DETECTIONS = 20_000  # some 10 MB while buffered


@dataclass(frozen=True, slots=True)
class ShardFooter:
    """The footer of one annotation object.

    Attributes:
        shard_id, shard_key: which shard.
        attempt: unique id of the attempt that wrote it; distinguishes a lost reply from a rival.
        counts: rows per status, with every status present.
        detections: boxes over all rows.
        source_truncated: the tar ended in the middle; rows before that are present.
        seconds: per stage, as the worker measured them.
        fill: per queue of the worker, its average fill from 0 to 1 over the images.
        warnings: rows per kind of warning; a row may have several.
    """

    shard_id: str
    shard_key: str
    attempt: str
    counts: dict[str, int]
    detections: int
    source_truncated: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """All rows."""
        return sum(self.counts.values())


class RowWriter:
    """Streams one shard's rows to a local spool file; ``finish`` adds the footer and closes.

    Rows are validated and buffered only until a row group is full, so memory does not grow with
    the shard. The spool file is the body of the one conditional put that commits the shard.
    """

    def __init__(self, spool: Path, run: RunIdentity) -> None:
        self._run = run
        self._rows: list[AnnotationRow] = []
        self._counts: Counter[str] = Counter(dict.fromkeys(STATUSES, 0))
        self._warnings: Counter[str] = Counter()
        self._detections = 0
        self._buffered = 0  # detections in the buffered rows
        self._writer = SealedWriter(spool, SCHEMA)

    def write(self, row: AnnotationRow) -> None:
        """Add one row.

        Raises:
            InvalidRow: at the latest in ``finish``; this row or one before it has impossible
                values (see ``validate_row``).
        """
        self._rows.append(row)
        self._buffered += len(row.detections)
        if len(self._rows) >= ROW_GROUP_ROWS or self._buffered >= ROW_GROUP_DETECTIONS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            validate_rows(self._rows, len(self._run.categories))
            self._counts.update([row.status for row in self._rows])
            for warning in [row.warning for row in self._rows if row.warning]:
                self._warnings.update(warning_kinds(warning))
            self._detections += self._buffered
            table = rows_to_table(self._rows)
            table.validate(full=True)
            self._writer.write(table)
            self._rows.clear()
            self._buffered = 0

    def finish(
        self,
        shard_id: str,
        shard_key: str,
        attempt: str,
        *,
        source_truncated: str | None = None,
        seconds: dict[str, float] | None = None,
        fill: dict[str, float] | None = None,
    ) -> ShardFooter:
        """Write what is buffered and the footer; the spool file is complete afterwards.

        Raises:
            InvalidRow: of a buffered row; the file is closed and must not be used.
        """
        try:
            self._flush()
        except InvalidRow:
            self.abandon()
            raise
        footer = ShardFooter(
            shard_id, shard_key, attempt, dict(self._counts), self._detections,
            source_truncated, seconds or {}, fill or {}, dict(self._warnings),
        )  # fmt: skip
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "box": "xyxy, pixels of the upright image",
            "run": _fields(self._run),
            "shard": asdict(footer),
        }
        self._writer.finish(metadata)
        return footer

    def abandon(self) -> None:
        """Close without a footer; the spool file must not be used."""
        self._rows.clear()
        self._writer.abandon()


@lru_cache(maxsize=4)
def _fields(run: RunIdentity) -> dict[str, Any]:
    """Return the run identity as JSON has it; of 80 classes it takes a millisecond to make."""
    return asdict(run)


def read_footer(store: SupportsGetRange, listed: StoredObject) -> ShardFooter:
    """Read the footer of one annotation object by a ranged read of its end.

    Raises:
        StorageError: not a Parquet file, or not one of ours.
    """
    metadata, _ = read_metadata(store, listed)
    return footer_of(metadata, listed.key)


def footer_of(metadata: dict[str, Any], key: str) -> ShardFooter:
    """Return the footer in an annotation object's JSON. Raises StorageError if it has none."""
    with reading_parquet(key):
        footer = ShardFooter(**metadata["shard"])
        if sum(footer.counts.values()) < 0 or footer.detections < 0:
            raise ValueError("negative counts")
        return footer


def read_identity(store: SupportsGet, key: str) -> RunIdentity:
    """Read the run identity in an annotation object. Raises StorageError: not one of ours."""
    with opened(store.get(key), key) as file:
        return identity_of(metadata_of(file, key))


def identity_of(metadata: dict[str, Any]) -> RunIdentity:
    """Return the run identity in an annotation object's JSON."""
    run = dict(metadata["run"])
    categories = tuple(Category(**c) for c in run.pop("categories"))
    return RunIdentity(**run, categories=categories)


def read_tables(
    store: SupportsGet, key: str, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Read one annotation object as Arrow tables, a row group at a time; ``columns`` None: all.

    Raises:
        ObjectNotFound: no such object.
        StorageError: not a Parquet file, or not one of ours.
    """
    with opened(store.get(key), key) as file:
        metadata_of(file, key)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(columns) if columns else None)
            yield with_missing_columns(table, columns)


def read_rows(store: SupportsGet, key: str) -> Iterator[AnnotationRow]:
    """Read one annotation object as rows, in the order of the shard."""
    for table in read_tables(store, key):
        with reading_parquet(key):
            yield from table_to_rows(table)


# Keys of a footer's ``seconds``. ``wait`` is the time the infer thread waits for images; the
# others are work. Only the driver knows ``commit``: it ends after the footer is written.
STAGES = ("fetch", "decode", "wait", "infer", "nms", "write")


COMMIT = "commit"


QUEUES = ("fetched", "decoded")  # keys of a footer's ``fill``

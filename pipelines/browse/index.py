"""The tables that the page asks: one DuckDB file, made from a run's Parquet when browsing starts.

``images``  a row an image, numbered in listing order: ``n``, the columns of the annotation row, the
            label version's decision counts, and ``twins``, the group of near duplicates.
``boxes``   a row a box: ``n``, ``layer`` (model, label, person, other), class, score, decision, who
            drew it, and xyxy in pixels of the upright image. In each layer they lie about in the
            images' order, so DuckDB finds those of an image without an index, which would have to
            fit into memory.

The file lies in a temporary folder of this process and is opened read-only, so that no query of the
page can change even this copy; nothing is written to the run.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from storage.errors import ConfigError
from storage.labels.versions import LabelVersion, read_label_tables, read_version, versions
from storage.review.answers import Answer, read_answers, standing
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

FILE = "browse.duckdb"
# However many boxes there are: what does not fit goes to disk. Each thread wants some of it.
_WRITING: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": "384MB",
    "threads": min(4, os.cpu_count() or 1),
}
_BATCH_ROWS = 20_000
_IMAGE_COLUMNS = (
    "image_id", "shard_id", "offset", "nbytes", "sha256", "phash", "width", "height", "status",
    "error", "frames", "warning", "detections",
)  # fmt: skip
# Hashes that differ in at most three bits share one of four 16-bit bands, so none is missed.
_TWIN_BITS, _BANDS, _CROWDED = 3, 4, 200
_COMPARED_AT_ONCE = 10_000  # images, of up to some hundred boxes in each run

_SCHEMA = """
CREATE TABLE images (
    n INTEGER, image_id VARCHAR, shard_id VARCHAR, "offset" BIGINT, nbytes BIGINT, sha256 VARCHAR,
    phash UBIGINT, width INTEGER, height INTEGER, status VARCHAR, error VARCHAR, frames INTEGER,
    warning VARCHAR, boxes INTEGER, best FLOAT, agreement FLOAT
);
CREATE TABLE boxes (
    n INTEGER, layer VARCHAR, class VARCHAR, score FLOAT, agreement FLOAT, decision VARCHAR,
    who VARCHAR, x1 FLOAT, y1 FLOAT, x2 FLOAT, y2 FLOAT
);
CREATE TABLE decided (
    n INTEGER, source VARCHAR, accepted INTEGER, ignored INTEGER, rejected INTEGER,
    annotator VARCHAR
);
CREATE TABLE beside (n INTEGER);
CREATE TABLE disagreement (n INTEGER, disagreement FLOAT, alone INTEGER);
"""
_INSERT_IMAGES = """
INSERT INTO images
SELECT n, image_id, shard_id, "offset", nbytes, sha256, phash, width, height, status, error, frames,
    warning, len(detections), list_max(list_transform(detections, lambda d: d.score)),
    list_min(list_transform(detections, lambda d: d.agreement))
FROM batch
"""
_INSERT_BOXES = """
INSERT INTO boxes
SELECT n, $layer, c.name, d.score, d.agreement, NULL, NULL,
    d.bbox[1], d.bbox[2], d.bbox[3], d.bbox[4]
FROM (SELECT {number} AS n, unnest(detections) AS d FROM batch {joined})
JOIN classes c ON c.layer = $layer AND c.id = d.category_id
"""
_INSERT_LABELS = """
INSERT INTO boxes
SELECT n, 'label', c.name, l.score, NULL,
    CASE WHEN l."ignore" THEN 'ignored' WHEN l.score IS NULL THEN 'human' ELSE 'accepted' END,
    annotator, l.bbox[1], l.bbox[2], l.bbox[3], l.bbox[4]
FROM (SELECT i.n, b.annotator, unnest(b.labels) AS l FROM batch b JOIN images i USING (image_id))
JOIN classes c ON c.layer = 'label' AND c.id = l.category_id
"""
_INSERT_DECIDED = """
INSERT INTO decided
SELECT i.n, b.source, len(list_filter(b.labels, lambda l: NOT l."ignore")),
    len(list_filter(b.labels, lambda l: l."ignore")), b.rejected, b.annotator
FROM batch b JOIN images i USING (image_id)
"""
_TWIN_PAIRS = """
WITH hashes AS (SELECT DISTINCT phash AS h FROM images WHERE phash IS NOT NULL),
    bands AS (
        SELECT h, b, (h >> (b * 16)::UBIGINT) & 65535 AS v
        FROM hashes, (SELECT unnest(range($bands)) AS b)
    ),
    quiet AS (SELECT b, v FROM bands GROUP BY b, v HAVING count(*) BETWEEN 2 AND $crowded)
SELECT DISTINCT x.h, y.h FROM bands x JOIN quiet USING (b, v) JOIN bands y USING (b, v)
WHERE x.h < y.h AND bit_count(xor(x.h, y.h)) <= $bits
"""
# The largest score of a box that the other layer has nothing of its class for (IoU 0.5). For some
# images at once: which boxes met has to fit into memory.
_DISAGREEMENT = """
INSERT INTO disagreement
WITH sure AS (
        SELECT rowid AS r, * FROM boxes
        WHERE n BETWEEN $first AND $last AND layer IN ('model', 'other') AND score >= 0.3
            AND n IN (SELECT n FROM beside)
    ),
    met AS (
        SELECT DISTINCT a.r FROM sure a JOIN sure b
        ON a.n = b.n AND a.class = b.class AND a.layer <> b.layer
        AND greatest(0, least(a.x2, b.x2) - greatest(a.x1, b.x1))
            * greatest(0, least(a.y2, b.y2) - greatest(a.y1, b.y1)) * 3
            >= (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1)
    )
SELECT n, max(score)::FLOAT AS disagreement, count(*)::INTEGER AS alone
FROM sure WHERE r NOT IN (SELECT r FROM met) GROUP BY n
"""


@dataclass(frozen=True, slots=True)
class Sources:
    """What is browsed: a run, a label version of it, and another run over the same images."""

    run: Manifest
    version: LabelVersion | None
    other: Manifest | None


def find_sources(run: Manifest, version: str | None, other: Manifest | None) -> Sources:
    """Resolve the version: the latest where none is named, none where there is none.

    Raises:
        ObjectNotFound: the named version does not exist.
    """
    if version is None and not versions(run.store):
        return Sources(run, None, other)
    return Sources(run, read_version(run.store, version), other)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C: DuckDB takes it, and raises a bare RuntimeError."""
    try:
        yield
    except RuntimeError as exc:
        if str(exc) != "Query interrupted":
            raise
        raise KeyboardInterrupt from exc


def build_index(sources: Sources, folder: Path) -> Path:
    """Write the tables to a new file in ``folder``; about a second for 30,000 images.

    Raises:
        ConfigError: the run has no row yet.
        StorageError: an object is damaged.
    """
    path = folder / FILE
    with interruptible(), duckdb.connect(str(path), config=_WRITING) as database:
        database.execute(_SCHEMA)
        _classes(database, sources)
        images = _images(database, sources.run)
        if not images:
            raise ConfigError(
                "the run has no row yet", hint="`labelfleet status` says how far it is"
            )
        if sources.version is not None:
            for table in _grouped(read_label_tables(sources.run.store, sources.version)):
                _insert(database, table, (_INSERT_LABELS, _INSERT_DECIDED))
        _people(database, list(standing(read_answers(sources.run.store))))
        if sources.other is not None:
            _other(database, sources.other)
            _disagreement(database, images)
        _twins(database)
    return path


def open_index(path: Path) -> duckdb.DuckDBPyConnection:
    """Open the tables to be read only: no file, network or setting is within a query's reach."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false", "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false", "memory_limit": "1GB",
        "temp_directory": str(path.parent / "spill"),
    }  # fmt: skip
    database = duckdb.connect(str(path), read_only=True, config=config)
    database.execute("SET lock_configuration = true")
    return database


def _classes(database: duckdb.DuckDBPyConnection, sources: Sources) -> None:
    database.execute("CREATE TABLE classes (layer VARCHAR, id INTEGER, name VARCHAR)")
    runs: list[tuple[str, Manifest]] = [("model", sources.run), ("label", sources.run)]
    if sources.other is not None:
        runs.append(("other", sources.other))
    rows = [
        (layer, index, category.name)
        for layer, run in runs
        for index, category in enumerate(run.record.identity.categories)
    ]
    if rows:
        database.executemany("INSERT INTO classes VALUES (?, ?, ?)", rows)


def _images(database: duckdb.DuckDBPyConnection, run: Manifest) -> int:
    count = 0
    boxes = _INSERT_BOXES.format(number="n", joined="")
    for table in _batches(run, _IMAGE_COLUMNS):
        numbers = pa.array(range(count, count + len(table)), pa.int32())
        batch = table.append_column("n", numbers)
        status = batch.column("status").cast(pa.string())
        batch = batch.set_column(batch.column_names.index("status"), "status", status)
        _insert(database, batch, (_INSERT_IMAGES,))
        _insert(database, batch, (boxes,), {"layer": "model"})
        count += len(table)
    return count


def _other(database: duckdb.DuckDBPyConnection, other: Manifest) -> None:
    """Boxes of another run, joined by the images' bytes."""
    joined = "JOIN images i USING (sha256) WHERE sha256 <> ''"
    boxes = _INSERT_BOXES.format(number="i.n", joined=joined)
    both = "INSERT INTO beside SELECT i.n FROM batch JOIN images i USING (sha256)"
    for table in _batches(other, ("sha256", "detections")):
        _insert(database, table, (boxes,), {"layer": "other"})
        _insert(database, table, (both,))


def _disagreement(database: duckdb.DuckDBPyConnection, images: int) -> None:
    """Tell for every image how much the two runs differ."""
    for first in range(0, images, _COMPARED_AT_ONCE):
        some = {"first": first, "last": first + _COMPARED_AT_ONCE - 1}
        database.execute(_DISAGREEMENT, some)


def _batches(run: Manifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Live rows in tables of some size, with what the page shows of their boxes."""

    def plain(table: pa.Table) -> pa.Table:
        at = table.column_names.index("detections")
        return table.set_column(at, "detections", _plain_boxes(table.column(at)))

    return _grouped(plain(table) for _, table in live_tables(run, columns))


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of some size: one insert a shard of 40 images, each with its join, takes minutes."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        if rows >= _BATCH_ROWS:
            yield pa.concat_tables(waiting, promote_options="permissive")
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting, promote_options="permissive")


def _plain_boxes(column: pa.ChunkedArray) -> pa.Array:
    """The four fields that the page shows, alike for every schema version; 3 has agreement."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0) if lists.num_chunks else pa.array([], lists.type)
    boxes = lists.values
    known = {field.name for field in boxes.type}
    parts = {name: boxes.field(name) for name in ("bbox", "category_id", "score")}
    agreement = "agreement" in known
    parts["agreement"] = (
        boxes.field("agreement") if agreement else pa.nulls(len(boxes), pa.float32())
    )
    plain = pa.StructArray.from_arrays(list(parts.values()), names=list(parts))
    return pa.ListArray.from_arrays(lists.offsets, plain)


def _insert(
    database: duckdb.DuckDBPyConnection,
    batch: pa.Table,
    statements: Sequence[str],
    parameters: Mapping[str, Any] | None = None,
) -> None:
    database.register("batch", batch)
    for statement in statements:
        database.execute(statement, parameters or None)
    database.unregister("batch")


def _people(database: duckdb.DuckDBPyConnection, answers: Sequence[Answer]) -> None:
    rows = [
        (answer.sha256, box.category, box.score, box.origin, answer.annotator, *box.bbox)
        for answer in answers
        if not answer.skipped
        for box in answer.boxes
    ]
    database.execute(
        "CREATE TABLE given (sha256 VARCHAR, class VARCHAR, score FLOAT, origin VARCHAR,"
        " who VARCHAR, x1 FLOAT, y1 FLOAT, x2 FLOAT, y2 FLOAT)"
    )
    if rows:
        database.executemany("INSERT INTO given VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    database.execute(
        "INSERT INTO boxes SELECT i.n, 'person', g.class, g.score, NULL, g.origin, g.who,"
        " g.x1, g.y1, g.x2, g.y2 FROM given g JOIN images i USING (sha256)"
    )
    database.execute("CREATE TABLE answered (sha256 VARCHAR, who VARCHAR, skipped BOOLEAN)")
    if answers:
        people = [(answer.sha256, answer.annotator, answer.skipped) for answer in answers]
        database.executemany("INSERT INTO answered VALUES (?, ?, ?)", people)


def _twins(database: duckdb.DuckDBPyConnection) -> None:
    """Group images whose perceptual hashes are equal or differ in a few bits."""
    leader: dict[int, int] = {}

    def top(of: int) -> int:
        while leader.setdefault(of, of) != of:
            of = leader[of]
        return of

    told = {"bands": _BANDS, "crowded": _CROWDED, "bits": _TWIN_BITS}
    for low, high in database.execute(_TWIN_PAIRS, told).fetchall():
        one, two = sorted((top(low), top(high)))
        leader[two] = one
    groups: dict[int, list[int]] = defaultdict(list)
    for of in leader:
        groups[top(of)].append(of)
    database.execute("CREATE TABLE likeness (phash UBIGINT, leader UBIGINT)")
    pairs = [(of, first) for first, members in groups.items() for of in members]
    if pairs:
        database.executemany("INSERT INTO likeness VALUES (?, ?)", pairs)
    database.execute(
        "CREATE TABLE twins AS SELECT n, leader FROM (SELECT i.n, coalesce(l.leader, i.phash) AS"
        " leader, count(*) OVER (PARTITION BY coalesce(l.leader, i.phash)) AS size"
        " FROM images i LEFT JOIN likeness l USING (phash) WHERE i.phash IS NOT NULL)"
        " WHERE size > 1"
    )


def layers_of(database: duckdb.DuckDBPyConnection) -> Counter[str]:
    """Return the number of boxes by layer."""
    return Counter(
        dict(database.execute("SELECT layer, count(*) FROM boxes GROUP BY 1").fetchall())
    )

"""Read a run's live rows; shared by all readers.

Live rows are those of committed, live shards, less the images that a later listing tombstoned
(changed or deleted since). Everything streams shard by shard; a million shards never sit in memory.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import ObjectNotFound
from storage.records import AnnotationRow, image_ids_of
from storage.runs.annotation_rows import table_to_rows
from storage.runs.annotations import read_tables
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest, annotation_key
from storage.shards.frames import file_id, frames_labelled


def live_tables(
    manifest: Manifest,
    columns: Sequence[str] | None = None,
    *,
    only: Container[str] | None = None,
) -> Iterator[tuple[str, pa.Table]]:
    """Yield (shard id, Arrow table) of live rows, a row group at a time, in listing order.

    Args:
        manifest: the run.
        columns: names from the annotation schema, or None for all.
        only: shard ids to read, or None for all.

    Shards that are not committed yet are passed over.
    """
    listing = Listing(manifest.store)
    dropped = listing.dropped()
    framed = bool(frames_labelled(manifest.record.inference))
    wanted = None if columns is None else list(dict.fromkeys(["image_id", *columns]))
    for shard_id in listing.live_ids():
        if only is not None and shard_id not in only:
            continue
        gone = dropped.get(shard_id)
        try:
            for table in read_tables(manifest.store, annotation_key(shard_id), wanted):
                live = table if gone is None else _without(table, gone, framed)
                yield shard_id, live if columns is None else live.select(list(columns))
        except ObjectNotFound:
            continue  # listed, not labelled yet


def live_rows(manifest: Manifest) -> Iterator[AnnotationRow]:
    """Yield live rows as records, in listing order."""
    for _, table in live_tables(manifest):
        yield from table_to_rows(table)


def _without(table: pa.Table, gone: set[str], framed: bool) -> pa.Table:
    """Return the table without the rows of these files; ``framed``: with all of their frames."""
    there = table.column("image_id")
    if framed:
        files = [file_id(image_id) for image_id in there.to_pylist()]
        there = pa.chunked_array([pa.array(files, pa.string())])
    candidates = [image_ids_of(key) for key in gone]
    known = set(there.filter(pc.is_in(there, value_set=_strings(sum(candidates, ())))).to_pylist())
    ids = [next((i for i in several if i in known), "") for several in candidates]
    return table.filter(pc.invert(pc.is_in(there, value_set=_strings(ids))))


def _strings(values: Iterable[str]) -> pa.Array:
    return pa.array(list(values), pa.string())

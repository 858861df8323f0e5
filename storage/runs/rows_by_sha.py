"""Finding a run's rows by the content of their images, whatever their shards and names."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from pathlib import Path

from storage.errors import ObjectNotFound
from storage.records import AnnotationRow, printable
from storage.runs.annotations import read_rows, read_tables
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest, annotation_key

_MOST_BOXES = 500_000  # of shards that are kept in memory, some 100 MB


class RowsBySha:
    """Finds a run's live row of an image by the sha256 of its bytes.

    The shard of the same id is looked into first: runs over one source share their shards. For
    other images an index of the whole run is made, once, on disk.

    Args:
        manifest: the run.
        folder: local, for the index.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self._manifest = manifest
        self._index_at = folder / f"index-{manifest.record.identity.config_hash}-{id(self)}.db"
        self._index: sqlite3.Connection | None = None
        listing = Listing(manifest.store)
        self._dropped = listing.dropped()
        live = set(listing.live_ids())
        self._committed = live & manifest.committed()
        self.unfinished = bool(live - self._committed - manifest.quarantined_ids())
        self._kept: OrderedDict[str, dict[str, AnnotationRow]] = OrderedDict()
        self._kept_boxes: dict[str, int] = {}

    def find(self, shard_id: str, sha256: str) -> AnnotationRow | None:
        """Return the row of an image, of status ok where there is one.

        Args:
            shard_id: where it is likely to be.
        """
        if shard_id in self._committed and (row := self._rows(shard_id).get(sha256)):
            return row
        where = self._look_up(sha256)
        return None if where is None else self._rows(where).get(sha256)

    def close(self) -> None:
        """Close the index."""
        if self._index is not None:
            self._index.close()

    def _rows(self, shard_id: str) -> dict[str, AnnotationRow]:
        if shard_id in self._kept:
            self._kept.move_to_end(shard_id)
            return self._kept[shard_id]
        gone = {printable(key) for key in self._dropped.get(shard_id, ())}
        rows: dict[str, AnnotationRow] = {}
        for row in read_rows(self._manifest.store, annotation_key(shard_id)):
            if row.sha256 and row.image_id not in gone and row.sha256 not in rows:
                rows[row.sha256] = row
        self._kept[shard_id] = rows
        self._kept_boxes[shard_id] = sum(len(row.detections) for row in rows.values())
        while len(self._kept) > 1 and sum(self._kept_boxes.values()) > _MOST_BOXES:
            oldest, _ = self._kept.popitem(last=False)
            del self._kept_boxes[oldest]
        return rows

    def _look_up(self, sha256: str) -> str | None:
        if self._index is None:
            self._index = self._make_index()
        asked = (bytes.fromhex(sha256),)
        found = self._index.execute("SELECT shard FROM seen WHERE sha = ?", asked).fetchone()
        return None if found is None else str(found[0])

    def _make_index(self) -> sqlite3.Connection:
        index = sqlite3.connect(self._index_at)
        index.execute("PRAGMA journal_mode = OFF")
        index.execute("PRAGMA synchronous = OFF")
        index.execute("CREATE TABLE seen (sha BLOB PRIMARY KEY, shard TEXT) WITHOUT ROWID")
        for shard_id in sorted(self._committed):
            gone = {printable(key) for key in self._dropped.get(shard_id, ())}
            try:
                for table in read_tables(
                    self._manifest.store, annotation_key(shard_id), ["image_id", "sha256"]
                ):
                    rows = table.to_pylist()
                    index.executemany(
                        "INSERT OR IGNORE INTO seen VALUES (?, ?)",
                        [
                            (bytes.fromhex(row["sha256"]), shard_id)
                            for row in rows
                            if row["sha256"] and row["image_id"] not in gone
                        ],
                    )
            except ObjectNotFound:
                continue  # removed since it was listed
        index.commit()
        return index

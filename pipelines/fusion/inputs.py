"""One run as fusion sees it: its class names mapped, its scores calibrated, its rows by sha256."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.fusion.boxes import Votes
from pipelines.policy.policy import Policy, Thresholds
from storage.boxes import clipped, has_area
from storage.errors import ConfigError, ObjectNotFound
from storage.records import AnnotationRow, printable
from storage.runs.annotations import read_rows, read_tables
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest, annotation_key

_MOST_BOXES = 500_000  # of shards that are kept in memory, some 100 MB


@dataclass(frozen=True, slots=True)
class FusionInput:
    """A run that is fused.

    Attributes:
        manifest: the run.
        to_fused: int64 [its classes], id in the fused run; -1: the class is left out.
        knows: bool [fused classes], whether the run's model has the class.
        calibration: what makes its scores probabilities; None: they count as they are.
        weight: how much the run counts.
    """

    manifest: Manifest
    to_fused: NDArray[np.int64]
    knows: NDArray[np.bool_]
    calibration: Thresholds | None
    weight: float

    @property
    def name(self) -> str:
        """The run's name, for people."""
        return self.manifest.record.identity.name

    def settings(self) -> dict[str, Any]:
        """What of the run moves a fused box, as JSON values."""
        identity = self.manifest.record.identity
        curves = self.calibration.curves if self.calibration else None
        by_class = None
        if curves is not None:
            by_class = [curve.model_dump(mode="json") for curve in curves]
        return {
            "name": identity.name,
            "config_hash": identity.config_hash,
            "model_sha256": identity.model_sha256,
            "weight": self.weight,
            "classes": self.to_fused.tolist(),
            "calibration": by_class,
        }

    def votes(self, row: AnnotationRow) -> tuple[Votes, NDArray[np.int64]]:
        """The votes of one row, and the index of each vote's box in the row.

        Boxes are clipped to the image; those without area there do not vote.
        """
        found = row.detections
        ids = self.to_fused[found.category_ids.astype(np.int64)]
        boxes = clipped(found.boxes.astype(np.float64), row.width, row.height)
        scores = found.scores.astype(np.float64)
        if self.calibration is not None:
            scores = self.calibration.probability(found.scores, found.category_ids)
        kept = np.flatnonzero(has_area(boxes) & (ids >= 0))
        return Votes(boxes[kept], scores[kept], ids[kept], self.knows, self.weight), kept


def class_map(
    manifest: Manifest, fused: list[str], renamed: Mapping[str, str]
) -> NDArray[np.int64]:
    """The fused id of each of a run's classes; -1 where it is left out.

    Args:
        fused: class names of the fused run.
        renamed: a name of the run by the fused name; '' leaves the class out.

    Raises:
        ConfigError: a name stands for no class of the fused run.
    """
    own = [c.name for c in manifest.record.identity.categories]
    wanted = [renamed.get(name, name) for name in own]
    unknown = [name for name, to in zip(own, wanted, strict=True) if to and to not in fused]
    if unknown:
        raise ConfigError(
            f"{manifest.url} has classes that the first run lacks: {', '.join(unknown)}",
            hint=f"--map '{unknown[0]}=NAME' for each, where NAME is one of {', '.join(fused)}; "
            f"--map '{unknown[0]}=' leaves it out",
        )
    return np.array([fused.index(to) if to else -1 for to in wanted], np.int64)


def calibration_of(manifest: Manifest) -> Thresholds | None:
    """The calibration that ``fit`` left with a run; None: it has none.

    Raises:
        ConfigError: the policy there is damaged, or that of another model.
    """
    policy = Policy.of_run(manifest.store, manifest.url)
    if policy is None or policy.calibration is None:
        return None
    return policy.for_run(manifest.record.identity)


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
        """The row of an image, of status ok where there is one.

        Args:
            shard_id: where it is likely to be.
        """
        if shard_id in self._committed and (row := self._rows(shard_id).get(sha256)):
            return row
        where = self._look_up(sha256)
        return None if where is None else self._rows(where).get(sha256)

    def close(self) -> None:
        """Let go of the index."""
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

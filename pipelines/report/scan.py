"""One pass over a run's live rows: counts, histograms, and which images the report shows.

Memory does not grow with the run: histograms have fixed bins, tables a cap, and the images to
show are kept in heaps. Which random images are shown depends on the seed and their ids alone.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.records import AnnotationRow, warning_kinds
from storage.runs.annotation_rows import table_to_rows
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

SHOWN_SCORE = 0.25  # boxes below it are kept in the rows, and neither drawn nor counted as objects
SCORE_BINS = 20
BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)
BOX_BUCKETS = (0, 1, 2, 3, 6, 11, 21, 51, 101)  # lower edges of the buckets, boxes
_MAX_LISTED = 50
_MAX_KINDS = 200


@dataclass(frozen=True, slots=True)
class Pick:
    """An image to show. ``uncertainty``: bits; None where no box reaches SHOWN_SCORE."""

    row: AnnotationRow
    uncertainty: float | None


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """Images that failed alike: how many, and the first of them."""

    status: str
    kind: str
    count: int
    example: str


@dataclass(slots=True)
class _Heap:
    """The ``size`` picks of lowest rank; ties go to the lesser image_id."""

    size: int
    entries: list[tuple[float, tuple[int, ...], Pick]] = field(default_factory=list)

    def admits(self, rank: float) -> bool:
        return self.size > 0 and (len(self.entries) < self.size or -rank >= self.entries[0][0])

    def add(self, rank: float, pick: Pick) -> None:
        # heapq keeps the least on top; the top must be the one to go first, so all is negated.
        tie = tuple(-ord(c) for c in pick.row.image_id)
        heapq.heappush(self.entries, (-rank, (*tie, 1), pick))
        if len(self.entries) > self.size:
            heapq.heappop(self.entries)

    def picks(self) -> list[Pick]:
        return [pick for _, _, pick in sorted(self.entries, key=lambda e: e[:2], reverse=True)]


@dataclass(slots=True)
class Scan:
    """What one pass found.

    Attributes:
        statuses: rows per status.
        detections: boxes in all rows, down to the run's score floor.
        by_class_and_score: int64 [classes, SCORE_BINS], boxes by score in steps of 1/SCORE_BINS.
        by_boxes: int64 [len(BOX_BUCKETS)], ok images by boxes of SHOWN_SCORE and more.
        failed: the first rows that are not ok, at most 50.
        warnings: rows by kind of warning, each with the first image that has it.
    """

    statuses: Counter[str]
    detections: int
    by_class_and_score: NDArray[np.int64]
    by_boxes: NDArray[np.int64]
    failed: list[AnnotationRow]
    warnings: dict[str, tuple[int, str]]
    _kinds: dict[tuple[str, str], tuple[int, str]]
    _least: _Heap
    _most: _Heap
    _random: _Heap
    _seed: int

    @property
    def images(self) -> int:
        """All live rows."""
        return self.statuses.total()

    @property
    def not_ok(self) -> int:
        """Live rows whose status is not ok."""
        return self.images - self.statuses["ok"]

    @property
    def shown_detections(self) -> int:
        """Boxes of SHOWN_SCORE and more."""
        return int(self.by_class_and_score[:, round(SHOWN_SCORE * SCORE_BINS) :].sum())

    def kinds(self) -> list[ErrorKind]:
        """Failures by kind, the most frequent first."""
        found = [ErrorKind(s, k, n, example) for (s, k), (n, example) in self._kinds.items()]
        return sorted(found, key=lambda e: (-e.count, e.status, e.kind))

    def gallery(self, sample: int) -> dict[str, list[Pick]]:
        """Least certain, most certain and random images, a third each, none of them twice."""
        shown: set[str] = set()
        groups: dict[str, list[Pick]] = {}
        share = -(-sample // 3)
        for name, heap in (("least", self._least), ("most", self._most), ("random", self._random)):
            fresh = [p for p in heap.picks() if p.row.image_id not in shown]
            groups[name] = fresh[: min(share, sample - len(shown))]
            shown.update(p.row.image_id for p in groups[name])
        return groups


def scan(manifest: Manifest, *, sample: int, seed: int) -> Scan:
    """Read all live rows once. ``sample``: how many images ``gallery`` may be asked for."""
    found = Scan(
        statuses=Counter(),
        detections=0,
        by_class_and_score=np.zeros(
            (len(manifest.record.identity.categories), SCORE_BINS), np.int64
        ),
        by_boxes=np.zeros(len(BOX_BUCKETS), np.int64),
        failed=[],
        warnings={},
        _kinds={},
        _least=_Heap(sample),
        _most=_Heap(sample),
        _random=_Heap(sample),
        _seed=seed,
    )
    for _, table in live_tables(manifest):
        if table.num_rows:
            _add(found, table.combine_chunks())
    return found


def _add(found: Scan, table: pa.Table) -> None:
    status = table.column("status").to_pylist()
    found.statuses.update(status)
    detections = table.column("detections").chunk(0)
    offsets = detections.offsets.to_numpy()
    boxes = detections.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    scores = boxes.field("score").to_numpy()
    classes = boxes.field("category_id").to_numpy()
    offsets = offsets - offsets[0]
    found.detections += len(scores)
    bins = np.minimum((scores * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
    np.add.at(found.by_class_and_score, (classes, bins), 1)
    n_shown, uncertainty = _per_image(scores, offsets)
    ok = np.array([s == "ok" for s in status])
    buckets = np.searchsorted(BOX_BUCKETS, n_shown[ok], side="right") - 1
    found.by_boxes += np.bincount(buckets, minlength=len(BOX_BUCKETS))
    for i in np.flatnonzero(~ok):
        _add_failed(found, next(table_to_rows(table.slice(int(i), 1))))
    image_ids = table.column("image_id").to_pylist()
    for image_id, warning in zip(image_ids, table.column("warning").to_pylist(), strict=True):
        for kind in warning_kinds(warning):
            count, example = found.warnings.get(kind, (0, image_id))
            found.warnings[kind] = (count + 1, example)
    for i in np.flatnonzero(ok):
        _offer(found, table, int(i), image_ids[i], float(uncertainty[i]))


def _per_image(
    scores: NDArray[np.float32], offsets: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return boxes of SHOWN_SCORE and more, and their mean score entropy in bits (NaN: none)."""
    shown = scores >= SHOWN_SCORE
    p = np.clip(scores.astype(np.float64), 1e-9, 1 - 1e-9)
    entropy = np.where(shown, -(p * np.log2(p) + (1 - p) * np.log2(1 - p)), 0.0)
    counts = np.diff(np.concatenate([[0], np.cumsum(shown)])[offsets])
    sums = np.diff(np.concatenate([[0.0], np.cumsum(entropy)])[offsets])
    return counts, np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _offer(found: Scan, table: pa.Table, i: int, image_id: str, uncertainty: float) -> None:
    ranks = [(found._random, _hash(found._seed, image_id))]
    if uncertainty == uncertainty:
        ranks += [(found._least, -uncertainty), (found._most, uncertainty)]
    wanted = [(heap, rank) for heap, rank in ranks if heap.admits(rank)]
    if wanted:
        row = next(table_to_rows(table.slice(i, 1)))
        pick = Pick(row, uncertainty if uncertainty == uncertainty else None)
        for heap, rank in wanted:
            heap.add(rank, pick)


def _hash(seed: int, image_id: str) -> float:
    digest = hashlib.blake2b(f"{seed}/{image_id}".encode(), digest_size=6).digest()
    return float(int.from_bytes(digest, "big"))


def _add_failed(found: Scan, row: AnnotationRow) -> None:
    if len(found.failed) < _MAX_LISTED:
        found.failed.append(row)
    key = (row.status, error_kind(row.error or ""))
    if key not in found._kinds and len(found._kinds) >= _MAX_KINDS:
        key = (row.status, "other kinds")
    count, example = found._kinds.get(key, (0, row.image_id))
    found._kinds[key] = (count + 1, example)


_PARTICULARS: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"'[^']*'|\"[^\"]*\""), "…"),
    (re.compile(r"\d[\d,._]*"), "#"),
)


def error_kind(error: str) -> str:
    """Return an error without names and numbers, so that alike ones fall together."""
    for pattern, instead in _PARTICULARS:
        error = pattern.sub(instead, error)
    return error if len(error) <= 160 else f"{error[:160]}…"

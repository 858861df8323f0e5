"""The audit as a random draw: each stratum's images in random order, boxes right or wrong."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.truth.bulk import accepted_in_bulk
from pipelines.truth.compared import queue_entries
from pipelines.truth.judge import TrueBoxes, answered_images, truth_images
from pipelines.truth.settle import settle
from storage.coco.truth import Truth
from storage.records import Detections
from storage.review.answers import read_answers, standing
from storage.runs.annotation_rows import table_to_rows
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class AuditImage:
    """One drawn image: its boxes, and which of them are not wrong.

    Attributes:
        scores: float32 [N], raw; ``ids`` int64 [N], category ids.
        right: bool [N]; True too for boxes in unlabelled regions.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    right: NDArray[np.bool_]


def audit_images(manifest: Manifest, *, count_bulk: bool = False) -> dict[str, list[AuditImage]]:
    """By stratum, the answered prefix of the audit's random order.

    The first open image ends the prefix, so that it does not matter which images people liked to
    answer first. An image that people skipped counts with all of its boxes wrong.

    Raises:
        ReviewError: an answer names a class that the run lacks.
    """
    answers = standing(read_answers(manifest.store))
    book = settle(a for a in answers if count_bulk or not accepted_in_bulk(a))
    order: dict[str, list[tuple[int, tuple[str, str]]]] = defaultdict(list)
    for sha256, entries in queue_entries([manifest]).items():
        for entry in entries:
            if entry.item.part == "audit":
                key = (entry.item.image_id, sha256)
                order[entry.item.stratum].append((entry.item.audit_rank, key))
    answered = {
        (row.image_id, row.sha256): _judged(row.detections, true)
        for row, true, _ in answered_images(manifest, count_bulk=count_bulk)
    }
    skipped = _skipped(manifest, {key for keys in order.values() for _, key in keys
                                  if key[1] in book.skipped})  # fmt: skip
    known = skipped | answered
    live = known.keys()
    out: dict[str, list[AuditImage]] = {}
    for stratum, ranked in order.items():
        out[stratum] = []
        for _, key in sorted(ranked):
            if key not in live and key[1] not in book.settled:
                break
            if key in live:  # a drawn image that is gone has left the population
                out[stratum].append(known[key])
    return out


def sampled_truth(
    manifest: Manifest, truth: Truth, *, allow_missing: bool = False
) -> list[AuditImage]:
    """Return the images with ground truth, in an order that has nothing to do with what is in them.

    Raises:
        TruthMismatch: names and rows do not join one to one, or (unless allowed) some are missing.
    """
    rows = list(truth_images(manifest, truth, allow_missing=allow_missing))
    order = np.random.default_rng(0).permutation(len(rows))
    return [_judged(rows[i][0].detections, rows[i][1]) for i in order]


def _judged(found: Detections, true: TrueBoxes) -> AuditImage:
    counted = true.counts(found.boxes, found.category_ids)
    right = np.ones(len(found.boxes), np.bool_)
    right[counted] = true.right(found.boxes[counted], found.category_ids[counted])
    return AuditImage(found.scores, found.category_ids.astype(np.int64), right)


def _skipped(manifest: Manifest, keys: set[tuple[str, str]]) -> dict[tuple[str, str], AuditImage]:
    """Skipped images with every box wrong: they may be the hard ones."""
    out = {}
    wanted = pa.array([image_id for image_id, _ in keys], pa.string())
    for _, table in live_tables(manifest) if keys else ():
        for row in table_to_rows(table.filter(pc.is_in(table.column("image_id"), wanted))):
            if (row.image_id, row.sha256) in keys and row.status == "ok":
                d = row.detections
                wrong = np.zeros(len(d.scores), np.bool_)
                out[row.image_id, row.sha256] = AuditImage(
                    d.scores, d.category_ids.astype(np.int64), wrong
                )
    return out

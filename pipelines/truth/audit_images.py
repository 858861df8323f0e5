"""The audit as a random draw: each stratum's images in random order, boxes right or wrong."""

from __future__ import annotations

import logging
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
from storage.errors import ConfigError
from storage.records import Detections
from storage.review.answers import read_answers, standing
from storage.review.not_shown import read_not_shown
from storage.runs.annotation_rows import table_to_rows
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

log = logging.getLogger("labelfleet.review")

_Key = tuple[str, str]  # image id, sha256


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
    answer first; how many answers wait behind it is logged. An image that was deleted or changed
    since has left the population and is passed over. An image whose answers cannot be compared
    (skipped, unusable, of a class that the run lacks), or that the last push could not show, counts
    with all of its boxes wrong.

    Raises:
        ReviewError: an answer names a class that the run lacks.
    """
    answers = standing(read_answers(manifest.store))
    book = settle(a for a in answers if count_bulk or not accepted_in_bulk(a))
    replied = book.settled.keys() | book.skipped | book.unusable
    replied |= read_not_shown(manifest.store).keys()
    order: dict[str, list[tuple[int, _Key]]] = defaultdict(list)
    for sha256, entries in queue_entries([manifest]).items():
        for entry in entries:
            if entry.item.part == "audit":
                key = (entry.item.image_id, sha256)
                order[entry.item.stratum].append((entry.item.audit_rank, key))
    answered = {
        (row.image_id, row.sha256): _judged(row.detections, true)
        for row, true, _ in answered_images(manifest, count_bulk=count_bulk)
    }
    live = _all_wrong(manifest, {key for ranked in order.values() for _, key in ranked})
    out: dict[str, list[AuditImage]] = {}
    for stratum, ranked in order.items():
        there = [key for _, key in sorted(ranked) if key in live]
        is_open = [i for i, (_, sha256) in enumerate(there) if sha256 not in replied]
        first = is_open[0] if is_open else len(there)
        out[stratum] = [answered.get(key, live[key]) for key in there[:first]]
        if waiting := len(there) - first - len(is_open):
            log.warning(
                "stratum %r: %d audit answers count once image %r, which comes before them in the "
                "random order, is answered", stratum, waiting, there[first][0],
            )  # fmt: skip
    return out


def nothing_counts(manifest: Manifest, *, count_bulk: bool, so: str) -> ConfigError:
    """Return the error for an audit without an answer that counts, by what is there instead.

    Args:
        count_bulk: whether answers that were given in bulk counted.
        so: the end of the message, what cannot be done.
    """
    answers = standing(read_answers(manifest.store))
    bulk = [a for a in answers if accepted_in_bulk(a)]
    audit = {
        sha256
        for sha256, entries in queue_entries([manifest]).items()
        if any(entry.item.part == "audit" for entry in entries)
    }
    not_counted = 0 if count_bulk else len(audit & {a.sha256 for a in bulk})
    if not audit:
        said = "no audit was drawn for this run"
        hint = "`labelfleet review route` draws one, people answer it, `labelfleet review pull`"
    else:
        said = "no image of this run's audit has an answer that counts"
        hint = "have people answer the images that were pushed, then `labelfleet review pull`"
    if not_counted:
        hint += (
            f"; --count-bulk counts the {not_counted:,} audit images that were accepted in bulk, "
            "with no time spent on them"
        )
    others = f" ({len(answers):,} answers are there, {len(bulk):,} of them in bulk)"
    return ConfigError(
        f"{said}{others if answers else ''}{so}", hint=f"{hint}; or give --truth COCO.json"
    )


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


def _all_wrong(manifest: Manifest, keys: set[_Key]) -> dict[_Key, AuditImage]:
    """Return those of the images that are live and readable, with every box wrong."""
    out = {}
    wanted = pa.array([image_id for image_id, _ in keys], pa.string())
    for _, table in live_tables(manifest) if keys else ():
        for row in table_to_rows(table.filter(pc.is_in(table.column("image_id"), wanted))):
            if (row.image_id, row.sha256) in keys and row.status == "ok":
                found = row.detections
                wrong = np.zeros(len(found.scores), np.bool_)
                ids = found.category_ids.astype(np.int64)
                out[row.image_id, row.sha256] = AuditImage(found.scores, ids, wrong)
    return out

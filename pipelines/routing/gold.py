"""Gold images: queued like the others, with boxes that are known, to measure annotators.

Known are the images of a COCO file, and those that people of earlier rounds in other projects
settled. (An image answered in the same project has a task there already.) Nothing in a task says
that it is gold: its reasons, its boxes and its place in the queue are those of any other image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.routing.audit_draw import random_key
from pipelines.truth.judge import TrueBoxes, truth_images
from pipelines.truth.settle import Settled, settle
from pipelines.truth.usable import usable_answers
from storage.coco.truth import Truth
from storage.review.gold import GoldImage, Xyxy
from storage.review.queue import read_queue
from storage.review.settings import read_settings
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

_SPARE = 64  # drawn beyond four times the number wanted, for those that the audit draws too


@dataclass(frozen=True, slots=True)
class GoldDraw:
    """Gold images to choose from, in random order.

    Attributes:
        wanted: how many to queue.
        known: what is true, by (image id, sha256); the first in random order come first.
    """

    wanted: int = 0
    known: Mapping[tuple[str, str], GoldImage] | None = None

    def __contains__(self, identity: object) -> bool:
        return self.known is not None and identity in self.known


def draw_gold(
    manifest: Manifest,
    wanted: int,
    truth: Truth | None,
    other_runs: Sequence[Manifest],
    seed: int,
) -> GoldDraw:
    """Return the live images with known boxes that this run's queue does not hold yet.

    Args:
        manifest: the run that is routed.
        wanted: gold images to queue now.
        truth: a COCO file; None: only settled answers of ``other_runs`` count.
        other_runs: earlier rounds; those of the run's own project are passed over.
        seed: of the random order.
    """
    if not wanted:
        return GoldDraw()
    known = _settled(manifest, other_runs)
    names = [c.name for c in manifest.record.identity.categories]
    if truth is not None:
        for row, true in truth_images(manifest, truth, allow_missing=True):
            known[row.image_id, row.sha256] = _of_truth(true, names)
    queued = {item.sha256 for item in read_queue(manifest.store, hidden=True)}
    order = sorted((random_key(seed, key[0]), key) for key in known if key[1] not in queued)
    return GoldDraw(wanted, {key: known[key] for _, key in order[: 4 * wanted + _SPARE]})


def _settled(
    manifest: Manifest, other_runs: Sequence[Manifest]
) -> dict[tuple[str, str], GoldImage]:
    """Return live images that people of other projects settled."""
    here = _project(manifest)
    elsewhere = [run for run in other_runs if here is None or _project(run) != here]
    if not elsewhere:
        return {}
    book = settle(usable_answers([manifest, *elsewhere]).answers)
    own_answers = {a.sha256 for a in usable_answers([manifest]).answers}
    settled = {key: found for key, found in book.settled.items() if key not in own_answers}
    out: dict[tuple[str, str], GoldImage] = {}
    wanted = pa.array(list(settled), pa.string())
    for _, table in live_tables(manifest, ["image_id", "sha256", "status"]):
        known = table.filter(pc.is_in(table.column("sha256"), wanted))
        for row in known.to_pylist():
            if row["status"] == "ok":
                out[row["image_id"], row["sha256"]] = _of_answer(settled[row["sha256"]])
    return out


def _project(manifest: Manifest) -> tuple[str, str] | None:
    """Return server and title of the project that a run is reviewed in; None before a push."""
    settings = read_settings(manifest.store)
    return None if settings is None else (settings.url, settings.project)


def _of_answer(settled: Settled) -> GoldImage:
    answer = settled.answer
    boxes = tuple((box.bbox, box.category) for box in answer.boxes)
    unjudged = [box.bbox for box in settled.disputed] + list(answer.hidden)
    return GoldImage("answers", boxes, tuple((bbox, "") for bbox in unjudged))


def _of_truth(true: TrueBoxes, names: Sequence[str]) -> GoldImage:
    return GoldImage(
        source="truth",
        boxes=tuple(
            (_xyxy(box), names[k]) for box, k in zip(true.boxes, true.category_ids, strict=True)
        ),
        regions=tuple(
            (_xyxy(box), "" if k < 0 else names[k])
            for box, k in zip(true.regions, true.region_ids, strict=True)
        ),
    )


def _xyxy(box: Sequence[float]) -> Xyxy:
    x1, y1, x2, y2 = (round(float(side), 2) for side in box)
    return x1, y1, x2, y2

"""The worst misses of an evaluation in pictures: the labels there, and the object they lack."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.evaluation.diagnosis import Missed
from pipelines.policy.box_batch import box_batch
from pipelines.policy.policy import Policy
from pipelines.report.corrections import Correction, Labels, Picture, draw_correction
from storage.objects.protocols import ObjectStore
from storage.runs.annotation_rows import table_to_rows
from storage.runs.image_bytes import read_images
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest
from workers.images.preprocessing import recorded_range


def worst_misses(
    manifest: Manifest, source: ObjectStore, missed: Iterable[Missed], policy: Policy, n: int = 12
) -> list[Picture]:
    """Return up to ``n`` of the missed objects, the first of each image, in the order given."""
    chosen: dict[str, Missed] = {}
    for one in missed:
        if len(chosen) < n:
            chosen.setdefault(one.image_id, one)
    found = {c.row.image_id: c for c in _as_corrections(manifest, chosen, policy)}
    names = [c.name for c in manifest.record.identity.categories]
    value_range = recorded_range(manifest.record.inference)
    drawn = {
        row.image_id: draw_correction(found[row.image_id], raw, names, value_range)
        for row, raw in read_images(manifest, source, [c.row for c in found.values()])
    }
    return [drawn[image_id] for image_id in chosen if image_id in drawn]


def _as_corrections(
    manifest: Manifest, chosen: dict[str, Missed], policy: Policy
) -> Iterable[Correction]:
    """Each miss as the correction that it needs."""
    identity = manifest.record.identity
    thresholds = policy.thresholds(identity.categories, identity.model_sha256)
    names = [c.name for c in identity.categories]
    wanted = pa.array(list(chosen), pa.string())
    for _, table in live_tables(manifest) if chosen else ():
        here = table.filter(pc.is_in(table.column("image_id"), wanted))
        for i, row in enumerate(table_to_rows(here)):
            if row.status != "ok":
                continue
            one = chosen[row.image_id]
            batch = box_batch(here.slice(i, 1), thresholds)
            at = batch.accepted
            before = Labels(batch.boxes[at].astype(np.float64), batch.category_ids[at].astype(int))
            after = Labels(np.array([one.xyxy]), np.array([names.index(one.name)], np.int64))
            yield Correction(row, before, after, "missed", None, 0, f"{one.share:.0%} of the image")

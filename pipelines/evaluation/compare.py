"""Entry point of `compare`: differences of two runs, image by image and as distributions."""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.drift import (
    RISK,
    SHOWN_SCORE,
    Drift,
    ImageStatistics,
    common_classes,
    drift_between,
    read_statistics,
    shares,
)
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.truth.judge import within
from pipelines.truth.matching import pair
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.runs.rows_by_sha import RowsBySha

Change = Literal["matched", "other_class", "moved", "lost", "new"]
CHANGES: tuple[Change, ...] = ("matched", "other_class", "moved", "lost", "new")
SIZES = ("small", "medium", "large")  # as COCO has them: below 32², below 96², the rest


@dataclass(frozen=True, slots=True)
class ChangedImage:
    """An image with its rows in both runs; ``changes``: boxes that are not matched."""

    changes: float
    old: AnnotationRow
    new: AnnotationRow


@dataclass(slots=True)
class Changes:
    """Boxes of ``SHOWN_SCORE`` and more of the images that both runs have, counted.

    Attributes:
        images: in both runs.
        by_class, by_size: by name, then by change. A lost box counts for its own class and size,
            any other box for those that it has in the new run.
        largest: images with most changes first.
    """

    images: int = 0
    by_class: dict[str, Counter[str]] = field(default_factory=dict)
    by_size: dict[str, Counter[str]] = field(default_factory=lambda: {s: Counter() for s in SIZES})
    largest: list[ChangedImage] = field(default_factory=list)

    def total(self) -> Counter[str]:
        """Over all sizes."""
        return sum(self.by_size.values(), Counter())


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, the older first.

    Attributes:
        old, new: their URLs. ``classes``: names that both have.
        only_old, only_new: class names of one run alone, which are left out.
        changes: on the images that both have.
        drift: the test over all images.
        scores, class_shares: for both runs, boxes by score (20 bins) and shown boxes by class.
        map_: mAP of both against a truth; None where none was given.
    """

    old: str
    new: str
    classes: tuple[str, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    changes: Changes
    drift: Drift
    scores: tuple[tuple[int, ...], tuple[int, ...]]
    class_shares: tuple[dict[str, float], dict[str, float]]
    map_: tuple[float | None, float | None] | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return plain values, with the names of the images that changed most."""
        return {
            "old": self.old,
            "new": self.new,
            "classes": list(self.classes),
            "only_old": list(self.only_old),
            "only_new": list(self.only_new),
            "shared_images": self.changes.images,
            "boxes": _counts(self.changes.total()),
            "by_class": {k: _counts(v) for k, v in self.changes.by_class.items()},
            "by_size": {k: _counts(v) for k, v in self.changes.by_size.items()},
            "largest": [{"image_id": c.new.image_id, "old_image_id": c.old.image_id,
                         "changes": c.changes} for c in self.changes.largest],
            "drift": self.drift.to_fields(),
            "scores": [list(one) for one in self.scores],
            "class_shares": list(self.class_shares),
            "map": None if self.map_ is None else list(self.map_),
        }  # fmt: skip


def compare_runs(
    old: Manifest,
    new: Manifest,
    *,
    truth: str | None = None,
    options: StorageOptions | None = None,
    risk: float = RISK,
    pictures: int = 12,
) -> Comparison:
    """Compare two runs: two models on the same images, or two dates of one job.

    Args:
        old, new: the runs.
        truth: COCO ground truth, any URL, for the mAP of both.
        options: how to reach ``truth``.
        risk: of a false alarm.
        pictures: images with the largest changes to keep.

    Raises:
        ConfigError: no class in common, or a run without labels.
        TruthMismatch: the truth does not go with the runs.
    """
    classes = common_classes(old, new)
    before = read_statistics(old, classes)
    frequent = [n.removeprefix("boxes of ") for n in before.names if n.startswith("boxes of ")]
    after = read_statistics(new, classes, names=frequent)
    measured = None
    if truth is not None:
        one, other = (
            evaluate_run(run, truth, options=options, allow_missing=True).map_
            for run in (old, new)
        )  # fmt: skip
        measured = (one, other)
    return Comparison(
        old=old.url,
        new=new.url,
        classes=tuple(classes),
        only_old=_only(old, classes),
        only_new=_only(new, classes),
        changes=_changes(old, new, classes, pictures),
        drift=drift_between(before, after, risk=risk),
        scores=(_bins(before), _bins(after)),
        class_shares=(
            dict(shares(before.classes, classes)),
            dict(shares(after.classes, classes)),
        ),
        map_=measured,
    )


def _bins(found: ImageStatistics) -> tuple[int, ...]:
    return tuple(int(n) for n in found.scores)


def _only(run: Manifest, classes: list[str]) -> tuple[str, ...]:
    return tuple(c.name for c in run.record.identity.categories if c.name not in classes)


def _counts(found: Counter[str]) -> dict[str, int]:
    return {change: found[change] for change in CHANGES}


def _changes(old: Manifest, new: Manifest, classes: list[str], pictures: int) -> Changes:
    found = Changes(by_class={name: Counter() for name in classes})
    maps = [_to_common(run, classes) for run in (old, new)]
    heap: list[tuple[float, int, ChangedImage]] = []
    with (
        tempfile.TemporaryDirectory(prefix="labelfleet-compare-") as folder,
        closing(RowsBySha(new, Path(folder))) as rows,
    ):
        for number, row in enumerate(live_rows(old)):
            other = rows.find(row.shard_id, row.sha256) if row.sha256 else None
            if other is None or row.status != "ok" or other.status != "ok":
                continue
            changed = _image(within(row), within(other), maps, classes, found)
            if changed.changes and pictures:
                heapq.heappush(heap, (changed.changes, -number, changed))
                if len(heap) > pictures:
                    heapq.heappop(heap)
    found.largest = [one for _, _, one in sorted(heap, key=lambda e: (-e[0], -e[1]))]
    return found


def _to_common(run: Manifest, classes: list[str]) -> NDArray[np.int64]:
    own = [c.name for c in run.record.identity.categories]
    return np.array([classes.index(n) if n in classes else -1 for n in own], np.int64)


def _image(
    old: AnnotationRow,
    new: AnnotationRow,
    maps: list[NDArray[np.int64]],
    classes: list[str],
    found: Changes,
) -> ChangedImage:
    (old_boxes, old_ids), (new_boxes, new_ids) = (
        _shown(row, to_common) for row, to_common in zip((old, new), maps, strict=True)
    )
    pairing = pair(new_boxes, new_ids, old_boxes, old_ids)
    kinds: list[tuple[Change, Any, Any, Any]] = [
        ("matched", pairing.right[0], new_boxes, new_ids),
        ("other_class", pairing.wrong_class[0], new_boxes, new_ids),
        ("moved", pairing.misplaced[0], new_boxes, new_ids),
        ("new", pairing.spurious, new_boxes, new_ids),
        ("lost", pairing.missed, old_boxes, old_ids),
    ]
    changes = 0.0
    for change, which, boxes, ids in kinds:
        for i in which:
            found.by_class[classes[ids[i]]][change] += 1
            found.by_size[_size(boxes[i])][change] += 1
        changes += 0 if change == "matched" else len(which)
    found.images += 1
    return ChangedImage(changes, old, new)


def _shown(
    row: AnnotationRow, to_common: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    d = row.detections
    ids = to_common[d.category_ids.astype(np.int64)]
    kept = (d.scores >= SHOWN_SCORE) & (ids >= 0)
    return d.boxes[kept], ids[kept]


def _size(box: NDArray[np.float32]) -> str:
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    return SIZES[0] if area < 32**2 else SIZES[1] if area < 96**2 else SIZES[2]

"""Measure a run's detections against COCO ground truth: mAP, AR, per class.

The figures are COCO's own (faster-coco-eval, at most 100 boxes a class and image), over the
images and the classes that run and ground truth share; what they do not share is counted and
named. An image whose status is not ok counts as one without detections. Detections are clipped to
their image, and those without area there are left out, as in labels and exports.

Images are matched in chunks, so that memory holds the matches and not the boxes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.evaluation.coco_matching import ChunkedMatching, detection_rows, truth_box
from pipelines.evaluation.diagnosis import diagnose
from pipelines.evaluation.result import ClassResult, Evaluation
from pipelines.policy.policy import Policy
from pipelines.truth.coco_truth import (
    Join,
    is_ignore_class,
    join_rows,
    match_categories,
    normal_name,
    refuse_unmatched,
)
from storage.coco.fields import Xywh
from storage.coco.truth import Truth, read_truth
from storage.errors import TruthMismatch
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow
from storage.runs.annotation_rows import table_to_rows
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest

CHUNK_IMAGES = 512
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)


def evaluate_run(
    manifest: Manifest,
    truth: str | Path,
    *,
    options: StorageOptions | None = None,
    allow_missing: bool = False,
    ignore_classes: Sequence[str] = (),
    policy: Policy | None = None,
) -> Evaluation:
    """Evaluate a run's live rows.

    Args:
        manifest: the run.
        truth: path or URL of a COCO detection file.
        options: how to reach ``truth``.
        allow_missing: leave out images without a row, instead of refusing.
        ignore_classes: names whose boxes mark regions to leave out, besides DontCare and its like.
        policy: None: COCO's figures alone; else also what its labels get wrong.

    Raises:
        ConfigError: ``truth`` is not a COCO file.
        TruthMismatch: names and rows do not join one to one, or no class is shared.
    """
    known = read_truth(truth, options)
    join = join_rows(known, _row_names(manifest))
    if not allow_missing or not join.image_of_row:
        refuse_unmatched(known, join, hint=_missing_hint(join))
    classes = _Classes.match(manifest, known, ignore_classes)
    scoring = _Scoring(known, classes)
    for row in _joined_rows(manifest, join):
        scoring.add(join.image_of_row[row.image_id], row)
    result = scoring.result(manifest.url, join)
    if policy is None:
        return result
    found = diagnose(manifest, known, join, classes.matched, classes.ignore, policy)
    return replace(result, diagnosis=found)


def _row_names(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for shard_id, table in live_tables(manifest, ["image_id"]):
        for image_id in table.column("image_id").to_pylist():
            yield image_id, shard_id


def _missing_hint(join: Join) -> str:
    if not join.image_of_row:
        return "none of the names match: is this the ground truth of the run's source?"
    return (
        "finish the run (`labelfleet status` says what is left), or leave these images out "
        "with --allow-missing"
    )


def _joined_rows(manifest: Manifest, join: Join) -> Iterator[AnnotationRow]:
    wanted = pa.array(list(join.image_of_row), pa.string())
    for _, table in live_tables(manifest, only=join.shard_ids):
        yield from table_to_rows(table.filter(pc.is_in(table.column("image_id"), wanted)))


@dataclass(frozen=True, slots=True)
class _Classes:
    """Which classes are compared. A shared class has one index in both, from 0."""

    shared: tuple[int, ...]  # the truth's ids
    matched: dict[int, int]  # the truth's id -> the run's contiguous id
    of_run: dict[int, int]  # the run's contiguous id -> index
    of_truth: dict[int, int]  # the truth's id -> index
    ignore: frozenset[int]  # the truth's ids whose boxes are regions to leave out
    unknown_to_run: tuple[str, ...]
    unknown_to_truth: tuple[str, ...]

    @staticmethod
    def match(manifest: Manifest, truth: Truth, ignore_classes: Sequence[str]) -> _Classes:
        run = [c.name for c in manifest.record.identity.categories]
        unwanted = {normal_name(name) for name in ignore_classes}
        named = {i for i, name in truth.categories.items() if normal_name(name) in unwanted}
        matched = match_categories(run, truth.categories)
        matched = {i: k for i, k in matched.items() if i not in named}
        ignore = named | {
            i for i, n in truth.categories.items() if i not in matched and is_ignore_class(n)
        }
        if not matched:
            raise TruthMismatch(
                f"{truth.source} and {manifest.url} share no class: "
                f"{sorted(truth.categories.values())} there, {run} in the run",
                hint="give the ground truth the run's class names",
            )
        shared = tuple(i for i in truth.categories if i in matched)
        return _Classes(
            shared=shared,
            matched={i: matched[i] for i in shared},
            of_run={matched[i]: index for index, i in enumerate(shared)},
            of_truth={i: index for index, i in enumerate(shared)},
            ignore=frozenset(ignore),
            unknown_to_run=tuple(
                n for i, n in truth.categories.items() if i not in matched and i not in ignore
            ),
            unknown_to_truth=tuple(n for k, n in enumerate(run) if k not in matched.values()),
        )


class _Scoring:
    """Collects joined rows, a chunk at a time, and adds up."""

    def __init__(self, truth: Truth, classes: _Classes) -> None:
        self._truth, self._classes = truth, classes
        self._matching = ChunkedMatching(len(classes.shared))
        self._chunk: list[tuple[int, AnnotationRow]] = []
        self._statuses: Counter[str] = Counter()
        self._n_truth: Counter[int] = Counter()
        self._n_detections: Counter[int] = Counter()
        self._ignored = self._n_outside = 0
        self._size_differs: list[str] = []
        self._n_size_differs = 0

    def add(self, image: int, row: AnnotationRow) -> None:
        """One joined row; ``image`` is its index in the ground truth."""
        self._statuses[row.status] += 1
        stated = self._truth.images[image]
        known = row.status == "ok" and stated.width and stated.height
        if known and (stated.width, stated.height) != (row.width, row.height):
            self._n_size_differs += 1
            self._size_differs.append(row.image_id)
            del self._size_differs[5:]
        self._chunk.append((image, row))
        if len(self._chunk) >= CHUNK_IMAGES:
            self._flush()

    def _flush(self) -> None:
        if not self._chunk:
            return
        truth: list[dict[str, Any]] = []
        detections: list[NDArray[np.float64]] = []
        for number, (image, row) in enumerate(self._chunk, 1):
            truth.extend(self._truth_of(number, image))
            detections.append(self._detections_of(number, row))
        self._matching.add(len(self._chunk), truth, np.concatenate(detections))
        self._chunk.clear()

    def _truth_of(self, number: int, image: int) -> Iterator[dict[str, Any]]:
        every = range(len(self._classes.shared))
        for box in self._truth.boxes[image]:
            if box.category_id in self._classes.ignore:
                self._ignored += 1
                yield from (_ignored(number, k, box.xywh, box.area) for k in every)
            elif (k_or_none := self._classes.of_truth.get(box.category_id)) is not None:
                self._ignored += box.ignore
                self._n_truth[k_or_none] += not box.ignore
                yield truth_box(k_or_none, box.xywh, box.area, ignore=box.ignore, number=number)
        for xywh in self._truth.regions_of(image):
            self._ignored += 1
            yield from (_ignored(number, k, xywh, xywh[2] * xywh[3]) for k in every)

    def _detections_of(self, number: int, row: AnnotationRow) -> NDArray[np.float64]:
        of_run = self._classes.of_run
        index = np.array([of_run.get(int(c), -1) for c in row.detections.category_ids], np.int64)
        rows = detection_rows(number, row.detections, (row.width, row.height), index)
        self._n_outside += int((index >= 0).sum()) - len(rows)
        for one, n in zip(*np.unique(rows[:, 6], return_counts=True), strict=True):
            self._n_detections[int(one) - 1] += int(n)
        return rows

    def result(self, run: str, join: Join) -> Evaluation:
        """Return everything added up."""
        self._flush()
        precision, recall = self._matching.curves()
        n_classes = len(self._classes.shared)
        return Evaluation(
            run=run,
            truth=self._truth.source,
            map_=_mean(precision[:, :, :, _ALL]),
            map50=_mean(precision[0, :, :, _ALL]),
            map75=_mean(precision[5, :, :, _ALL]),
            ar=_mean(recall[:, :, _ALL]),
            ap_small=_mean(precision[:, :, :, _SMALL]),
            ap_medium=_mean(precision[:, :, :, _MEDIUM]),
            ap_large=_mean(precision[:, :, :, _LARGE]),
            ar_small=_mean(recall[:, :, _SMALL]),
            ar_medium=_mean(recall[:, :, _MEDIUM]),
            ar_large=_mean(recall[:, :, _LARGE]),
            classes=tuple(self._class(k, precision, recall) for k in range(n_classes)),
            images=self._statuses.total(),
            statuses=dict(self._statuses),
            missing=len(join.unmatched),
            rows_without_truth=join.rows_without_truth,
            ignored=self._ignored,
            outside=self._n_outside,
            without_area=self._truth.without_area,
            size_differs=tuple(self._size_differs),
            n_size_differs=self._n_size_differs,
            unknown_to_run=self._classes.unknown_to_run,
            unknown_to_truth=self._classes.unknown_to_truth,
        )

    def _class(
        self, k: int, precision: NDArray[np.float64], recall: NDArray[np.float64]
    ) -> ClassResult:
        official_id = self._classes.shared[k]
        return ClassResult(
            name=self._truth.categories[official_id],
            official_id=official_id,
            ap=_mean(precision[:, :, k, _ALL]),
            ap50=_mean(precision[0, :, k, _ALL]),
            ap75=_mean(precision[5, :, k, _ALL]),
            ar=_mean(recall[:, k, _ALL]),
            truth=self._n_truth[k],
            detections=self._n_detections[k],
        )


def _ignored(number: int, k: int, xywh: Xywh, area: float) -> dict[str, Any]:
    return truth_box(k, xywh, area, ignore=True, number=number)


def _mean(values: NDArray[np.float64]) -> float | None:
    there = values[values > -1]  # COCO writes -1 where there is nothing to find
    return float(there.mean()) if there.size else None

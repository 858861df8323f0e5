"""What the student gained over its teacher on held-out images, with intervals.

Both are labelled runs over the same images. Their differences have intervals by a paired bootstrap
over images, see ``pipelines.models.loss_interval``: the same draw for both, 90 % between the ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from pipelines.evaluation.result import Evaluation
from pipelines.models.loss_interval import (
    Areas,
    Loss,
    Matches,
    loss_between,
    match,
)
from pipelines.models.measure import expected_from_truth
from pipelines.truth.coco_truth import join_rows
from pipelines.truth.matching import pair
from storage.boxes import clipped
from storage.coco.truth import Truth
from storage.records import AnnotationRow, Detections
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest

SIZES: dict[str, Areas] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
SURE = 0.5  # boxes that a picture is chosen by
Verdict = Literal["better", "worse", "unclear"]


@dataclass(frozen=True, slots=True)
class Gain:
    """One figure of both, in points from 0 to 100; None where the truth has nothing of it.

    Attributes:
        name: ``mAP``, a size, or a class.
        gain, low, high: student less teacher, and the interval that holds it with 90 %.
        objects: of this kind in the truth.
    """

    name: str
    teacher: float | None
    student: float | None
    gain: float | None
    low: float | None
    high: float | None
    objects: int

    @property
    def verdict(self) -> Verdict:
        """Whether the interval leaves no doubt."""
        if self.low is not None and self.low > 0:
            return "better"
        return "worse" if self.high is not None and self.high < 0 else "unclear"


def signed(points: float | None) -> str:
    """Return points with their sign; a zero has none."""
    if points is None:
        return "–"
    said = f"{points:+.1f}"
    return "0.0" if said in ("-0.0", "+0.0") else said


@dataclass(frozen=True, slots=True)
class Comparison:
    """Teacher and student on the same images.

    Attributes:
        images: compared.
        overall: the mAP.
        sizes, classes: by size of the object, and by class.
        better, worse: images by how many more objects the student got right, or fewer.
    """

    images: int
    overall: Gain
    sizes: tuple[Gain, ...]
    classes: tuple[Gain, ...]
    better: tuple[str, ...]
    worse: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The result, plainly."""
        one = self.overall
        if one.gain is None:
            return "The held-out truth has no object of these classes: nothing can be said."
        figures = (
            f"{one.student:.1f} against {one.teacher:.1f} points of mAP on {self.images} held-out "
            f"images, {signed(one.gain)} [{signed(one.low)}, {signed(one.high)}]"
        )
        if one.verdict == "better":
            return f"The student beats its teacher: {figures}."
        if one.verdict == "worse":
            return f"The student did not win, it is worse than its teacher: {figures}."
        did = "gained" if one.gain > 0 else "did not win"
        return (
            f"The student {did}, and the images do not settle it: {figures}. The interval holds 0."
        )

    def to_fields(self) -> dict[str, Any]:
        """Return plain values, with the sentence and the verdict."""
        return {**asdict(self), "verdict": self.overall.verdict, "sentence": self.sentence}

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> Comparison:
        """Read what ``to_fields`` gave."""
        return Comparison(
            images=fields["images"],
            overall=Gain(**fields["overall"]),
            sizes=tuple(Gain(**one) for one in fields["sizes"]),
            classes=tuple(Gain(**one) for one in fields["classes"]),
            better=tuple(fields["better"]),
            worse=tuple(fields["worse"]),
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    """The runs' rows, image by image as the truth lists them."""

    truth: Truth
    indices: tuple[int, ...]
    names: tuple[str, ...]
    teacher: tuple[Detections, ...]
    student: tuple[Detections, ...]


def compare_on(
    teacher: Manifest,
    student: Manifest,
    truth: Truth,
    evaluations: tuple[Evaluation, Evaluation],
    *,
    pictures: int = 8,
) -> Comparison:
    """Compare two runs over the images of a truth.

    Args:
        teacher, student: runs with the same classes.
        truth: COCO ground truth of their images.
        evaluations: of both, for the figures themselves.
        pictures: images to name on each side.

    Raises:
        TruthMismatch: names or classes do not join.
    """
    seen = _seen(teacher, student, truth)
    names = [c.name for c in teacher.record.identity.categories]
    expected = expected_from_truth(truth, seen.indices, names)
    before, after = match(seen.teacher, expected), match(seen.student, expected)
    one, other = evaluations
    overall = _gain("mAP", one.map_, other.map_, before, after)
    sizes = []
    for name, areas in SIZES.items():
        pair_ = [match(found, expected, areas) for found in (seen.teacher, seen.student)]
        figures = (getattr(e, f"ap_{name}") for e in evaluations)
        sizes.append(_gain(name, *figures, *pair_))
    classes = [
        _gain(a.name, a.ap, b.ap, *(_only(m, names.index(a.name)) for m in (before, after)))
        for a, b in zip(one.classes, other.classes, strict=True)
        if a.name in names
    ]
    better, worse = _telling(seen, names, pictures)
    return Comparison(len(seen.indices), overall, tuple(sizes), tuple(classes), better, worse)


def _gain(
    name: str, teacher: float | None, student: float | None, before: Matches, after: Matches
) -> Gain:
    objects = sum(int(one.wanted.sum()) for one in before.classes)
    if teacher is None or student is None or not objects:
        return Gain(name, None, None, None, None, None, objects)
    lost: Loss = loss_between(before, after)
    gain = 100 * (student - teacher)
    low, high = min(-lost.high, gain), max(-lost.low, gain)
    return Gain(name, 100 * teacher, 100 * student, gain, low, high, objects)


def _only(found: Matches, k: int) -> Matches:
    return replace(found, classes=(found.classes[k],))


def _seen(teacher: Manifest, student: Manifest, truth: Truth) -> _Seen:
    rows = {row.image_id: row for row in live_rows(teacher)}
    others = {row.image_id: row for row in live_rows(student)}
    join = join_rows(truth, ((image_id, "") for image_id in rows))
    both = [(i, name) for name, i in join.image_of_row.items() if name in others]
    both.sort()
    return _Seen(
        truth,
        tuple(i for i, _ in both),
        tuple(name for _, name in both),
        tuple(_inside(rows[name]) for _, name in both),
        tuple(_inside(others[name]) for _, name in both),
    )


def _inside(row: AnnotationRow) -> Detections:
    found = row.detections
    return replace(found, boxes=clipped(found.boxes, row.width, row.height))


def _telling(
    seen: _Seen, names: Sequence[str], pictures: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the images where one of the two got most more objects right than the other."""
    scored = sorted(_differences(seen, names), key=lambda entry: (-entry[0], entry[1]))
    better = tuple(name for by, name in scored[:pictures] if by > 0)
    worse = tuple(name for by, name in scored[::-1][:pictures] if by < 0)
    return better, worse


def _differences(seen: _Seen, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield by how many right boxes, less wrong ones, the student is ahead on each image."""
    for at, index in enumerate(seen.indices):
        boxes, ids = true_boxes(seen.truth, index, names)
        marks = []
        for found in (seen.teacher[at], seen.student[at]):
            sure = found.scores >= SURE
            pairing = pair(
                found.boxes[sure].astype(np.float64), found.category_ids[sure].astype(np.int64),
                boxes, ids,
            )  # fmt: skip
            right = len(pairing.right[0])
            marks.append(right - (int(sure.sum()) - right))
        yield marks[1] - marks[0], seen.names[at]


def true_boxes(truth: Truth, index: int, names: Sequence[str]) -> tuple[Any, Any]:
    """Return the boxes of an image that count: xyxy float64 [N, 4], and class ids int64 [N]."""
    known = {name: k for k, name in enumerate(names)}
    boxes, ids = [], []
    for box in truth.boxes[index]:
        k = known.get(truth.categories[box.category_id])
        if k is not None and not box.ignore:
            x, y, width, height = box.xywh
            boxes.append((x, y, x + width, y + height))
            ids.append(k)
    return np.array(boxes, np.float64).reshape(-1, 4), np.array(ids, np.int64)

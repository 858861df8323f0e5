"""Figures by annotator: pace, what they did to the predicted boxes, how far they agree.

Two answers to one image agree on the boxes of the same class that overlap with IoU 0.5 or more; the
share is 2 × agreed / (boxes of one + boxes of the other), pooled over the images both answered, and
1 where neither drew anything. Gold are answers of others with Label Studio's star, and the images
of ``review.gold``, whose boxes were known before.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from pipelines.truth.bulk import accepted_in_bulk
from pipelines.truth.matching import iou_matrix, match
from storage.review.answers import Answer
from storage.review.gold import GoldImage, Xyxy

_IOU = 0.5
_KINDS = ("kept", "moved", "relabelled", "added", "deleted")


@dataclass(frozen=True, slots=True)
class AnnotatorFigures:
    """One person.

    Attributes:
        name: as Label Studio knows them.
        images, skipped: answered and declined; ``bulk``: answered without looking.
        seconds: median an image; None: Label Studio measured none.
        boxes: what became of boxes, by kind: kept, moved, relabelled, added, deleted.
        error_others: 1 - agreement with other people on the same images; None: no such image.
        error_gold: 1 - agreement with gold on ``gold_images`` images; None: no such image.
    """

    name: str
    images: int
    skipped: int
    bulk: int
    seconds: float | None
    boxes: dict[str, int]
    error_others: float | None
    error_gold: float | None
    gold_images: int = 0

    def share(self, kind: str) -> float | None:
        """Return the share of the boxes that this person handled; None: none."""
        total = sum(self.boxes.values())
        return self.boxes[kind] / total if total else None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two people on the images that both answered."""

    one: str
    other: str
    images: int
    share: float


@dataclass(frozen=True, slots=True)
class AcceptRate:
    """Predicted boxes of a class that were shown, and how many were left as they were."""

    category: str
    shown: int
    kept: int


@dataclass(frozen=True, slots=True)
class PeopleReport:
    """All annotators; ``agreement`` pairs in the order of their names, ``classes`` by name."""

    people: tuple[AnnotatorFigures, ...]
    agreement: tuple[Agreement, ...]
    classes: tuple[AcceptRate, ...]

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def people_report(
    answers: Iterable[Answer], gold: Mapping[str, GoldImage] | None = None
) -> PeopleReport:
    """Return figures from the answers that stand.

    Of one person's answers to an image the last counts.

    Args:
        answers: of all people.
        gold: what is true of gold images, by sha256.
    """
    by_person: dict[str, dict[str, Answer]] = defaultdict(dict)
    skipped: Counter[str] = Counter()
    for answer in sorted(answers, key=lambda a: a.submitted_at):
        if answer.skipped:
            skipped[answer.annotator] += 1
        else:
            by_person[answer.annotator][answer.sha256] = answer
    names = sorted({*by_person, *skipped})
    people = [_figures(name, by_person, skipped[name], gold or {}) for name in names]
    pairs = [
        Agreement(one, other, images, share)
        for one, other in itertools.combinations(names, 2)
        for images, share in [_agreement(_boxes_of(_shared(by_person[one], by_person[other])))]
        if share is not None
    ]
    return PeopleReport(tuple(people), tuple(pairs), _accept_rates(by_person))


def _figures(
    name: str,
    by_person: Mapping[str, Mapping[str, Answer]],
    skipped: int,
    gold: Mapping[str, GoldImage],
) -> AnnotatorFigures:
    own = by_person.get(name, {})
    seconds = [a.lead_time_s for a in own.values() if a.lead_time_s]
    boxes = Counter(str(box.origin) for a in own.values() for box in a.boxes)
    deleted = sum(len(a.deleted) for a in own.values())
    others = [_shared(own, answers) for other, answers in by_person.items() if other != name]
    compared = [pair for pairs in others for pair in pairs]
    starred = [pair for pair in compared if pair[1].ground_truth and pair[1].sha256 not in gold]
    known = _boxes_of(starred) + [
        _against_gold(own[sha256], gold[sha256]) for sha256 in sorted(own.keys() & gold.keys())
    ]
    images = {pair[0].sha256 for pair in starred} | (own.keys() & gold.keys())
    return AnnotatorFigures(
        name=name,
        images=len(own),
        skipped=skipped,
        bulk=sum(accepted_in_bulk(a) for a in own.values()),
        seconds=median(seconds) if seconds else None,
        boxes={**{kind: boxes[kind] for kind in _KINDS[:-1]}, "deleted": deleted},
        error_others=_error(_boxes_of(compared)),
        error_gold=_error(known),
        gold_images=len(images),
    )


_Pairs = Sequence[tuple[Answer, Answer]]
_Boxes = Sequence[tuple[Xyxy, str]]  # (corners, class)


def _shared(one: Mapping[str, Answer], other: Mapping[str, Answer]) -> _Pairs:
    return [(one[sha256], other[sha256]) for sha256 in sorted(one.keys() & other.keys())]


def _boxes_of(pairs: _Pairs) -> list[tuple[_Boxes, _Boxes]]:
    return [(_drawn(one), _drawn(other)) for one, other in pairs]


def _drawn(answer: Answer) -> _Boxes:
    return [(box.bbox, box.category) for box in answer.boxes]


def _against_gold(answer: Answer, gold: GoldImage) -> tuple[_Boxes, _Boxes]:
    """Return what was drawn and what is true; boxes in unjudged regions are left out."""
    drawn = [
        (bbox, category)
        for bbox, category in _drawn(answer)
        if not any(_within(bbox, at) and of in ("", category) for at, of in gold.regions)
    ]
    return drawn, gold.boxes


def _within(bbox: Xyxy, region: Xyxy) -> bool:
    x, y = (bbox[0] + bbox[2]) / 2, (bbox[1] + bbox[3]) / 2
    return region[0] <= x <= region[2] and region[1] <= y <= region[3]


def _error(pairs: Sequence[tuple[_Boxes, _Boxes]]) -> float | None:
    share = _agreement(pairs)[1]
    return None if share is None else 1 - share


def _agreement(pairs: Sequence[tuple[_Boxes, _Boxes]]) -> tuple[int, float | None]:
    """(images, share of boxes agreed on); None: no image in common."""
    agreed = sum(_agreed(one, other) for one, other in pairs)
    boxes = sum(len(one) + len(other) for one, other in pairs)
    if not pairs:
        return 0, None
    return len(pairs), 2 * agreed / boxes if boxes else 1.0


def _agreed(one: _Boxes, other: _Boxes) -> int:
    iou = iou_matrix(_corners(one), _corners(other))
    same = np.array([[a == b for _, b in other] for _, a in one], np.bool_).reshape(
        len(one), len(other)
    )
    return len(match(np.where(same, iou, 0.0), _IOU)[0])


def _corners(boxes: _Boxes) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([bbox for bbox, _ in boxes], np.float64).reshape(-1, 4)


def _accept_rates(by_person: Mapping[str, Mapping[str, Answer]]) -> tuple[AcceptRate, ...]:
    """By class; a relabelled box counts where it went, and bulk answers do not count."""
    shown: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for answers in by_person.values():
        for answer in answers.values():
            if accepted_in_bulk(answer):
                continue
            shown.update(box.category for box in answer.boxes if box.origin != "added")
            shown.update(box.category for box in answer.deleted)
            kept.update(box.category for box in answer.boxes if box.origin == "kept")
    return tuple(AcceptRate(name, shown[name], kept[name]) for name in sorted(shown))

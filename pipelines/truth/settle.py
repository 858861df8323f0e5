"""Settle which answer counts for an image that was edited, disputed, skipped, or answered twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from pipelines.truth.matching import iou_matrix, match
from storage.errors import ConfigError
from storage.review.answers import Answer, ReviewedBox

Settling = Literal["latest", "agreement"]


@dataclass(frozen=True, slots=True)
class Settled:
    """What people say about one image, by its pixels.

    Attributes:
        answer: the answer that counts; its boxes are labels.
        disputed: boxes that not enough people drew: to be ignored, neither object nor background.
        annotators: everyone who answered, in order of answering.
    """

    answer: Answer
    disputed: tuple[ReviewedBox, ...] = ()
    annotators: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerBook:
    """All answers, settled.

    Attributes:
        settled: by sha256, what counts.
        skipped: images that people only skipped.
        not_shown: images that the last push could not show to anybody.
        unusable: images whose answers hold only what cannot become boxes, see ``Answer.unusable``.
    """

    settled: dict[str, Settled]
    skipped: frozenset[str]
    unusable: frozenset[str] = frozenset()
    not_shown: frozenset[str] = frozenset()


def settle(answers: Iterable[Answer], how: Settling = "latest") -> AnswerBook:
    """Return one answer an image.

    ``latest``: of several people's answers the last one counts, and one person's skip never takes
    another's answer away. ``agreement``: a box counts when more than half of the people who
    answered drew it (same class, IoU >= 0.5); the others are disputed. Where an answer has Label
    Studio's star, only starred ones count. An answer with parts that cannot become boxes settles
    nothing, and boxes without area are left out.

    Args:
        answers: those that stand (``storage.review.answers.standing``), of one run or of several;
            joined by sha256.

    Raises:
        ConfigError: ``how`` is neither of the two.
    """
    if how not in get_args(Settling):
        raise ConfigError(
            f"answers cannot be settled by {how!r}", hint=f"one of {', '.join(get_args(Settling))}"
        )
    by_image: dict[str, dict[str, Answer]] = defaultdict(dict)
    skipped, unusable = set(), set()
    for answer in sorted(answers, key=lambda a: (a.submitted_at, a.annotation_id)):
        if answer.skipped:
            skipped.add(answer.sha256)
        elif answer.unusable:
            unusable.add(answer.sha256)
        else:
            people = by_image[answer.sha256]
            people.pop(answer.annotator, None)  # the last word moves to the end
            people[answer.annotator] = _without_flat_boxes(answer)
    chosen = _agreed if how == "agreement" else _latest
    settled = {sha256: chosen(_gold(list(p.values()))) for sha256, p in by_image.items()}
    unusable -= settled.keys()
    return AnswerBook(settled, frozenset(skipped - settled.keys() - unusable), frozenset(unusable))


def _gold(answers: list[Answer]) -> list[Answer]:
    """Return the starred answers, or all where there is none."""
    return [a for a in answers if a.ground_truth] or answers


def _without_flat_boxes(answer: Answer) -> Answer:
    """Return the answer without boxes of no area: a click that drew nothing."""
    kept = tuple(
        box for box in answer.boxes
        if box.bbox[2] > box.bbox[0] and box.bbox[3] > box.bbox[1]
    )  # fmt: skip
    return answer if len(kept) == len(answer.boxes) else replace(answer, boxes=kept)


def _latest(answers: Sequence[Answer]) -> Settled:
    return Settled(answers[-1], annotators=tuple(a.annotator for a in answers))


def _agreed(answers: Sequence[Answer]) -> Settled:
    """Return boxes by majority, each as the last person of its majority left it."""
    last = answers[-1]
    people = tuple(a.annotator for a in answers)
    votes = _votes(answers)
    agreed = tuple(box for box, n in votes if 2 * n > len(answers))
    disputed = tuple(box for box, n in votes if 2 * n <= len(answers))
    return Settled(replace(last, boxes=agreed), disputed, people)


def _votes(answers: Sequence[Answer]) -> list[tuple[ReviewedBox, int]]:
    """Return every distinct box with how many people drew it; of equal boxes the last person's."""
    found: list[tuple[ReviewedBox, int]] = []
    for answer in reversed(answers):
        pool = [box for box, _ in found]
        same = np.array(
            [[a.category == b.category for b in pool] for a in answer.boxes], np.bool_
        ).reshape(len(answer.boxes), len(pool))
        iou = iou_matrix(_corners(answer.boxes), _corners(pool))
        rows, columns = match(np.where(same, iou, 0.0), 0.5)
        for column in columns:
            box, n = found[column]
            found[column] = (box, n + 1)
        joined = set(rows.tolist())
        found += [(box, 1) for i, box in enumerate(answer.boxes) if i not in joined]
    return found


def _corners(boxes: Sequence[ReviewedBox]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array([box.bbox for box in boxes], np.float64).reshape(-1, 4)

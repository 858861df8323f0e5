"""Weighted boxes fusion (Solovyev, Wang, Gabruseva 2021): boxes of several models into one set.

Boxes of one class are visited by falling score. Each joins the cluster whose fused box it overlaps
most, if by more than ``iou``, else it founds one. A fused box is the mean of its members, weighted
by score; its score is the mean of theirs, lowered where fewer runs voted than could have. Equal to
``ensemble_boxes.weighted_boxes_fusion`` 1.0.9 with ``conf_type="avg"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Votes:
    """The boxes of one run on one image.

    Attributes:
        boxes: float64 [N, 4], xyxy, with area.
        scores: float64 [N], comparable between the runs, in [0, 1].
        category_ids: int64 [N], ids of the fused run.
        knows: bool [classes], the classes that the run's model has.
        weight: how much the run counts.
    """

    boxes: Floats
    scores: Floats
    category_ids: NDArray[np.int64]
    knows: NDArray[np.bool_]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class FusedBoxes:
    """N fused boxes, highest score first.

    Attributes:
        boxes: float64 [N, 4]. ``scores``: float64 [N]. ``category_ids``: int64 [N].
        members: for each box its (run, box of that run) pairs, highest score first.
        run_scores: float64 [N, runs], each run's best score for the box; not a number: no vote.
        agreement: float64 [N], in [0, 1]; not a number where one run alone knows the class.
    """

    boxes: Floats
    scores: Floats
    category_ids: NDArray[np.int64]
    members: tuple[tuple[tuple[int, int], ...], ...]
    run_scores: Floats
    agreement: Floats

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(slots=True)
class _Cluster:
    """One object as found so far; ``total``: sum of weighted scores times boxes."""

    total: Floats
    conf: float
    members: list[tuple[int, int]] = field(default_factory=list)

    def add(self, member: tuple[int, int], box: Floats, conf: float) -> Floats:
        self.total = self.total + conf * box
        self.conf += conf
        self.members.append(member)
        mean: Floats = self.total / self.conf if self.conf > 0 else box
        return mean


def fuse_boxes(runs: Sequence[Votes], iou: float = 0.55, *, one_vote: bool = False) -> FusedBoxes:
    """Fuse the boxes that several runs found on one image.

    Args:
        runs: at least one.
        iou: boxes that overlap by more are one object.
        one_vote: a run votes once for an object. Boxes of one run that overlap, as its own
            non-maximum suppression left them, then stay apart, instead of being averaged. False:
            as the reference implementation has it.
    """
    every = np.concatenate([run.category_ids for run in runs])
    parts = [_fuse_class(runs, int(category_id), iou, one_vote) for category_id in np.unique(every)]
    flat = [(box, score, cat, members) for part in parts for box, score, cat, members in part]
    flat.sort(key=lambda one: -one[1])  # stable: equal scores stay in the order of their classes
    members = tuple(tuple(one[3]) for one in flat)
    n = len(flat)
    category_ids = np.array([one[2] for one in flat], np.int64)
    best = [_best_of_runs(runs, one) for one in members]
    run_scores = np.full((n, len(runs)), np.nan)
    for i, votes in enumerate(best):
        for run, at in votes.items():
            run_scores[i, run] = runs[run].scores[at]
    agreement = [_agreement(runs, v, c) for v, c in zip(best, category_ids, strict=True)]
    return FusedBoxes(
        boxes=np.array([one[0] for one in flat], np.float64).reshape(n, 4),
        scores=np.array([one[1] for one in flat], np.float64),
        category_ids=category_ids,
        members=members,
        run_scores=run_scores,
        agreement=np.array(agreement, np.float64),
    )


def _fuse_class(
    runs: Sequence[Votes], category_id: int, iou: float, one_vote: bool
) -> list[tuple[Floats, float, int, list[tuple[int, int]]]]:
    """(box, score, category id, members) of each object of one class."""
    candidates = [
        (float(run.scores[at]) * run.weight, number, int(at))
        for number, run in enumerate(runs)
        for at in np.flatnonzero(run.category_ids == category_id)
    ]
    candidates.sort(key=lambda one: (-one[0], one[1], one[2]))
    clusters: list[_Cluster] = []
    fused = np.empty((len(candidates), 4))
    voted = np.zeros((len(candidates), len(runs)), np.bool_)
    for conf, number, at in candidates:
        box = runs[number].boxes[at]
        closed = voted[: len(clusters), number] & one_vote
        which = _nearest(fused[: len(clusters)], box, iou, closed)
        if which < 0:
            which = len(clusters)
            clusters.append(_Cluster(np.zeros(4), 0.0))
        fused[which] = clusters[which].add((number, at), box, conf)
        voted[which, number] = True
    able = [run.weight for run in runs if run.knows[category_id]]
    return [
        (
            fused[i],
            c.conf / len(c.members) * min(len(able), len(c.members)) / sum(able),
            category_id,
            c.members,
        )
        for i, c in enumerate(clusters)
    ]


def _nearest(boxes: Floats, box: Floats, iou: float, closed: NDArray[np.bool_]) -> int:
    """Return the index of the open box that overlaps most, if by more than ``iou``; else -1."""
    if not len(boxes):
        return -1
    overlaps = np.where(closed, -1.0, _ious(boxes, box))
    best = int(np.argmax(overlaps))
    return best if overlaps[best] > iou else -1


def _ious(boxes: Floats, box: Floats) -> Floats:
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, 2:], box[2:])
    inter = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    own = (box[2] - box[0]) * (box[3] - box[1])
    out: Floats = inter / (areas + own - inter)
    return out


def _best_of_runs(runs: Sequence[Votes], members: Sequence[tuple[int, int]]) -> dict[int, int]:
    """By run that voted, its highest-scoring box of the cluster."""
    best: dict[int, int] = {}
    for run, at in members:
        if run not in best or runs[run].scores[at] > runs[run].scores[best[run]]:
            best[run] = at
    return best


def _agreement(runs: Sequence[Votes], best: dict[int, int], category_id: int) -> float:
    """Average IoU times the ratio of scores over the pairs of runs that know the class.

    A pair of which one did not vote counts 0.
    """
    able = [i for i, run in enumerate(runs) if run.knows[category_id]]
    if len(able) < 2:
        return float("nan")
    pairs = list(combinations(able, 2))
    total = 0.0
    for a, b in pairs:
        if a in best and b in best:
            one, other = best[a], best[b]
            scores = sorted((float(runs[a].scores[one]), float(runs[b].scores[other])))
            ratio = scores[0] / scores[1] if scores[1] > 0 else 1.0
            overlap = float(_ious(runs[a].boxes[one][None], runs[b].boxes[other])[0])
            total += overlap * ratio
    return min(max(total / len(pairs), 0.0), 1.0)

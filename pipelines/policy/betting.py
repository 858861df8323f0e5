"""A test that a finite population of images holds few wrong boxes, from a random draw of them.

Hypothesis: of the accepted boxes of all images, more than ``1 - target`` are wrong. Known of every
image is how many boxes are accepted; how many of those are wrong is known of the drawn images
alone. The capital of a gambler who bets against the hypothesis, image by image in random order, is
a non-negative supermartingale while it is true, so it exceeds 1 / delta with a probability of delta
at most, whatever the distribution and for any number of images (Waudby-Smith and Ramdas 2020,
"Confidence sequences for sampling without replacement", arXiv 2006.04347; 2023, "Estimating means
of bounded random variables by betting", arXiv 2010.09686, section 5; Ville's inequality). The unit
is the image, since its boxes are right or wrong together.

Three details:

- **What an image pays.** The next image pays ``stake * (level(a) - wrong)``, where ``a`` is its
  accepted boxes. Any levels do whose mean over the images still to be drawn is
  ``1 / stake + expected``, ``expected`` being the wrong boxes that the hypothesis leaves for each
  of them: then the capital cannot grow on average. No payment may be negative, so a crowded image
  needs a level of at least its own boxes. ``level(a) = max(floor, a)`` with one floor for all grows
  fastest where nothing is wrong (water-filling, from the concavity of the logarithm). Crowded
  images then limit only their own bets, and an audit that found them right gains more than one that
  missed them.
- **The stake** is a share of the largest one possible. The share is the one that has grown most so
  far, where ``_PRIOR`` images with a third of the permitted errors count as seen: only the images
  before decide about the next one.
- **Several strata**: the wrong boxes may lie in them in any proportion, and the capital counts at
  the worst one (Spertus and Stark 2022). Log capital is concave in the allocation, so the worst is
  a corner. Stakes are in proportion to the images that a drawn one stands for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_STRATA = 8  # corners grow as 2 ** strata
_MOST_LOST = 0.97  # of a payment, by an image with wrong boxes alone: no image ends the game
_SHARES = np.array([0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.97])  # of the largest stake possible
_PRIOR = 100  # images
_ANTICIPATED = 1 / 3  # of the permitted errors
_KNOTS = 48  # at most
_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DrawnStratum:
    """One stratum at one threshold.

    Attributes:
        sizes: int64 [L], how many of its images have 0, 1, … L - 1 accepted boxes.
        accepted: int64 [n], accepted boxes of the drawn images, in random order.
        wrong: int64 [n], the wrong ones of them.
    """

    sizes: _Ints
    accepted: _Ints
    wrong: _Ints

    @property
    def images(self) -> int:
        """Images in the stratum."""
        return int(self.sizes.sum())

    @property
    def boxes(self) -> int:
        """Accepted boxes of all its images."""
        return int(self.sizes @ np.arange(len(self.sizes)))


def log_capital(strata: Sequence[DrawnStratum], target: float) -> float:
    """Log of the largest capital on the way, at the worst allocation; -inf without a draw.

    Args:
        strata: at most ``MOST_STRATA``, each with at least one drawn image.
        target: share of accepted boxes that is to be right.
    """
    boxes = sum(s.boxes for s in strata)
    if not boxes:
        return -np.inf
    total = fewest_too_many(boxes, target)
    seen = np.array([float(s.wrong.sum()) for s in strata])
    most = np.array([float(s.boxes - (s.accepted - s.wrong).sum()) for s in strata])
    if total > most.sum():
        return np.inf  # even if every box that was not seen is wrong
    corners = _corners(total, seen, most)
    if not len(corners):
        return -np.inf  # too much is wrong already
    return float(least_capital(strata, corners, total).max())


def fewest_too_many(boxes: int, target: float) -> int:
    """Return the fewest wrong boxes with which fewer than ``target`` of all are right."""
    return int(np.floor((1 - target) * boxes + 1e-9)) + 1


def least_capital(strata: Sequence[DrawnStratum], corners: _Floats, total: int) -> _Floats:
    """Log of the least capital over the corners [n], after each image in order of play.

    Args:
        strata: drawn from.
        corners: float64 [V, strata], wrong boxes of each stratum under the hypothesis.
        total: wrong boxes of all strata under the hypothesis.
    """
    turns = _turns(strata, total)
    share = _shares(strata, turns, total)
    capital: _Floats = np.zeros((len(corners), len(turns.place)))
    impossible = np.zeros(capital.shape, np.bool_)
    for h, game in enumerate(turns.games):
        at = turns.place[turns.which == h]
        expected = (corners[:, h, None] - game.seen) / game.left
        capital[:, at] = game.growth(share[at], expected)
        impossible[:, at] = expected > game.mean + 1e-9
    capital = np.cumsum(capital, axis=1)
    # Allocations between two corners may be possible where one corner is not, so a corner leaves
    # the minimum only with all others: at a step that no allocation allows, it is false.
    capital[:, np.logical_or.accumulate(impossible.all(axis=0))] = np.inf
    return np.asarray(capital.min(axis=0), np.float64)


class _Game:
    """The bets on one stratum's images; row ``t`` is what is known before its image ``t``.

    Attributes:
        seen: float64 [n], wrong boxes seen before.
        left: float64 [n], images still to be drawn.
        mean: float64 [n], their accepted boxes on average.
        least: float64 [n], wrong boxes of the next image that every possible allocation leaves on
            average, at least.
        stands_for: images that a drawn one stands for, as a share of the largest stratum's figure.
    """

    def __init__(self, stratum: DrawnStratum) -> None:
        n, size = len(stratum.wrong), np.arange(len(stratum.sizes))
        self._drawn = stratum.wrong.astype(np.float64)
        self._own = stratum.accepted / _MOST_LOST
        self.seen = _before(self._drawn)
        self.left = stratum.images - np.arange(n, dtype=np.float64)
        self.mean = (stratum.boxes - _before(stratum.accepted.astype(np.float64))) / self.left
        self.least = np.zeros(n)
        self.stands_for = 1.0
        # Mean level of the images still to be drawn for floors at these knots. Between knots the
        # line lies above the curve, which is convex, so a floor read from it is never too high.
        self._knots = _knots(stratum.sizes) / _MOST_LOST
        levels = np.maximum(self._knots, size[:, None] / _MOST_LOST)
        gone = _before(levels[stratum.accepted])
        self._means = (stratum.sizes @ levels - gone) / self.left[:, None]  # [n, knots]

    def growth(self, share: _Floats, expected: _Floats) -> _Floats:
        """Log of what each image pays.

        Args:
            share: float64 [n], of the largest stake possible.
            expected: float64 [V, n], wrong boxes that the hypothesis leaves for each image, not
                fewer than ``least``.
        """
        room = np.maximum(self._means[:, 0] - self.least, 1e-9)
        stake = share * self.stands_for / room
        # What an allocation leaves beyond the least is paid to every image alike: log capital is
        # concave in the allocation then.
        level = np.maximum(self._floors(1 / stake + self.least), self._own)
        level = level + (expected - self.least)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(np.maximum(stake * (level - self._drawn), 0.0)))

    def _floors(self, mean: _Floats) -> _Floats:
        """Floors at which the levels have these means [n]."""
        end = self._means[:, -1]
        apart = np.arange(len(end)) * (float(self._means.max()) + 1.0)  # one curve after the other
        curve = (self._means + apart[:, None]).ravel()
        knots = np.broadcast_to(self._knots, self._means.shape).ravel()
        inside = np.interp(np.minimum(mean, end) + apart, curve, knots)
        return np.asarray(np.where(mean > end, self._knots[-1] + mean - end, inside))


@dataclass(frozen=True, slots=True)
class _Turns:
    """The order of play: the strata take turns.

    Attributes:
        games: one a stratum.
        which: int64 [n], the stratum of each image, stratum by stratum.
        place: int64 [n], when each of them is played.
    """

    games: list[_Game]
    which: _Ints
    place: _Ints


def _turns(strata: Sequence[DrawnStratum], total: int) -> _Turns:
    games = [_Game(s) for s in strata]
    which = np.repeat(np.arange(len(strata)), [len(s.wrong) for s in strata])
    when = np.concatenate([(np.arange(len(s.wrong)) + 0.5) / len(s.wrong) for s in strata])
    order = np.argsort(when, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    stands_for = np.array([s.images / len(s.wrong) for s in strata])
    # What the other strata can hold at most, before each image: all boxes that were not seen right.
    most = np.empty((len(strata), len(order)))
    for h, s in enumerate(strata):
        right = np.zeros(len(order))
        right[place[which == h]] = s.accepted - s.wrong
        most[h] = s.boxes - _before(right)
    for h, game in enumerate(games):
        others = np.delete(most, h, axis=0).sum(axis=0)[place[which == h]]
        game.least = np.maximum(total - others - game.seen, 0.0) / game.left
        game.stands_for = float(stands_for[h] / stands_for.max())
    return _Turns(games, which, place)


def _shares(strata: Sequence[DrawnStratum], turns: _Turns, total: int) -> _Floats:
    """Share of the largest stake for each image in order of play: the one that has grown most.

    It is judged with the wrong boxes in proportion to the accepted ones, whatever the corner, so
    that log capital stays concave in the allocation.
    """
    boxes = sum(s.boxes for s in strata)
    grown = np.empty((len(_SHARES), len(turns.place)))
    for h, (s, game) in enumerate(zip(strata, turns.games, strict=True)):
        even = np.maximum((total * s.boxes / boxes - game.seen) / game.left, game.least)
        at = turns.place[turns.which == h]
        for i, share in enumerate(_SHARES):
            grown[i, at] = game.growth(np.full(len(at), share), even[None])[0]
    before = _before(grown.T).T + _PRIOR * _anticipated(strata, total / boxes)[:, None]
    return np.asarray(_SHARES[np.argmax(before, axis=0)], np.float64)


def _anticipated(strata: Sequence[DrawnStratum], permitted: float) -> _Floats:
    """Growth by image at each of ``_SHARES`` if so many errors occur in equal shares everywhere."""
    longest = max(len(s.sizes) for s in strata)
    sizes = np.sum([np.pad(s.sizes, (0, longest - len(s.sizes))) for s in strata], axis=0)
    size = np.flatnonzero(sizes)
    share = sizes[size] / sizes.sum()
    knots = _knots(sizes)
    means = share @ (np.maximum(size[:, None], knots) / _MOST_LOST)
    expected = permitted * float(share @ size)
    stake = _SHARES / max(means[0] - expected, 1e-9)
    mean = 1 / stake + expected
    floors = np.interp(mean, means, knots / _MOST_LOST) + np.maximum(mean - means[-1], 0.0)
    level = np.maximum(floors[:, None], size / _MOST_LOST)
    pays = stake[:, None] * (level - _ANTICIPATED * permitted * size)
    return np.asarray(np.log(np.maximum(pays, 1e-12)) @ share, np.float64)


def _knots(sizes: _Ints) -> _Ints:
    """Return 0 and the counts that images have, all of them or some spread over the images."""
    counts = np.flatnonzero(sizes)
    if len(counts) >= _KNOTS:
        at = np.searchsorted(np.cumsum(sizes[counts]), np.linspace(0, sizes.sum(), _KNOTS))
        counts = counts[np.unique(np.append(np.minimum(at, len(counts) - 1), len(counts) - 1))]
    return np.asarray(np.unique(np.append(0, counts)), np.int64)


def _before(values: _Floats) -> _Floats:
    """Sums of the rows before each row."""
    return np.asarray(np.cumsum(values, axis=0) - values, np.float64)


def _corners(total: float, seen: _Floats, most: _Floats) -> _Floats:
    """Corners [V, strata] of all allocations of ``total`` between what was seen and can be."""
    n, found = len(seen), []
    for free in range(n):
        others = [h for h in range(n) if h != free]
        for choice in itertools.product((0, 1), repeat=len(others)):
            corner = np.empty(n)
            for h, high in zip(others, choice, strict=True):
                corner[h] = most[h] if high else seen[h]
            corner[free] = total - corner[others].sum()
            if seen[free] <= corner[free] <= most[free]:
                found.append(corner)
    return np.array(found).reshape(-1, n)

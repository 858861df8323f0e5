"""A test that a finite population of images holds few wrong boxes, from a random draw of them.

Hypothesis: of the accepted boxes of all images, ``1 - target`` or more are wrong. What is known of
every image is how many boxes are accepted; how many of those are wrong is known of the drawn images
alone. The capital of a gambler who bets against the hypothesis, image by image in random order, is
a non-negative supermartingale while it is true, so it exceeds 1 / delta with a probability of delta
at most, whatever the distribution and for any number of images (Waudby-Smith and Ramdas 2020, 2023,
without replacement; Ville's inequality). The unit is the image, since its boxes are right or wrong
together.

Two details:

- An image's wrong boxes are bounded by a cap, chosen from the accepted counts alone; what images
  hold beyond the cap is charged as wrong in full. One crowded image then does not dull every bet.
- Several strata: the wrong boxes may lie in them in any proportion, and the capital counts at the
  worst one (Spertus and Stark 2022). Log capital is concave in the allocation, so the worst is a
  corner. Stakes are in proportion to the images that a drawn one stands for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_STRATA = 8  # corners grow as 2 ** strata
_MOST_STAKE = 0.9  # of what could be lost: no single image ends the game
_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DrawnStratum:
    """One stratum at one threshold.

    Attributes:
        sizes: int64 [L], how many of its images have 0, 1, … L - 1 accepted boxes.
        wrong: int64 [n], wrong accepted boxes of the drawn images, in random order.
    """

    sizes: _Ints
    wrong: _Ints

    @property
    def images(self) -> int:
        """Images in the stratum."""
        return int(self.sizes.sum())


def log_capital(strata: Sequence[DrawnStratum], target: float) -> float:
    """Log of the largest capital on the way, at the worst allocation; -inf without a draw.

    Args:
        strata: at most ``MOST_STRATA``, each with at least one drawn image.
        target: share of accepted boxes that is to be right.
    """
    sizes = _total(strata)
    cap, total = _cap(sizes, target)
    if total <= 0 or not strata:
        return -np.inf
    wrong = [np.minimum(s.wrong, cap).astype(np.float64) for s in strata]
    seen = np.array([w.sum() for w in wrong])
    most = np.array([_capped(s.sizes, cap) for s in strata])
    corners = _corners(total, seen, most)
    if not len(corners):
        # Either everything was seen and is right often enough, or too much is wrong already.
        return np.inf if total > most.sum() or _all_seen(strata, seen, total) else -np.inf
    return _played(strata, wrong, corners, cap, total / sizes.sum())


def _played(
    strata: Sequence[DrawnStratum],
    wrong: Sequence[_Floats],
    corners: _Floats,
    cap: int,
    level: float,
) -> float:
    """Play the game: take the least capital over the corners after each image, then its maximum.

    Args:
        strata: drawn from.
        wrong: float64 [n] a stratum, capped.
        corners: float64 [V, strata], wrong boxes of each stratum under the hypothesis.
        cap: wrong boxes of an image, at most.
        level: wrong boxes of an image under the hypothesis, on average.
    """
    which = np.concatenate([np.full(len(w), h) for h, w in enumerate(wrong)])
    place = np.concatenate([(np.arange(len(w)) + 0.5) / len(w) for w in wrong])
    before = np.concatenate([np.cumsum(w) - w for w in wrong])
    left = np.concatenate(
        [s.images - np.arange(len(w)) for s, w in zip(strata, wrong, strict=True)]
    )
    order = np.argsort(place, kind="stable")  # the strata take turns
    which, before, left = which[order], before[order], left[order]
    drawn = np.concatenate(list(wrong))[order]
    stands_for = np.array([s.images / len(w) for s, w in zip(strata, wrong, strict=True)])
    stake = _stakes(drawn, level, cap) * (stands_for / stands_for.max())[which]
    expected = (corners[:, which] - before) / left  # of the next image, [V, n]
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.log(np.maximum(1 + stake * (expected - drawn), 0.0))
    impossible = expected > cap  # the remaining images cannot hold that many wrong boxes
    capital = np.cumsum(growth, axis=1)
    # Allocations between two corners may be possible where one corner is not, so a corner leaves
    # the minimum only with all others: at a step that no allocation allows, it is false.
    capital[:, np.logical_or.accumulate(impossible.all(axis=0))] = np.inf
    return float(capital.min(axis=0).max())


def _stakes(drawn: _Floats, level: float, cap: int) -> _Floats:
    """Stakes [n] that only the images before each one decide (aGRAPA, Waudby-Smith and Ramdas)."""
    earlier = np.arange(len(drawn))
    mean = (level / 3 + np.cumsum(drawn) - drawn) / (1 + earlier)
    squares = (level / 3 + np.cumsum(drawn**2) - drawn**2) / (1 + earlier)
    edge = level - mean
    variance = np.maximum(squares - mean**2, 1e-9)
    wanted = edge / (variance + edge**2)
    return np.asarray(np.clip(wanted, 0.0, _MOST_STAKE / cap), np.float64)


def _total(strata: Sequence[DrawnStratum]) -> _Ints:
    longest = max((len(s.sizes) for s in strata), default=1)
    out = np.zeros(longest, np.int64)
    for s in strata:
        out[: len(s.sizes)] += s.sizes
    return out


def _cap(sizes: _Ints, target: float) -> tuple[int, float]:
    """Choose the cap with the most for the bets to win; return it with the wrong boxes left."""
    counts = np.arange(len(sizes))
    allowed = (1 - target) * float((sizes * counts).sum())
    caps = np.arange(1, max(len(sizes), 2))
    beyond = np.maximum(counts[None] - caps[:, None], 0) @ sizes
    left = allowed - beyond
    best = int(np.argmax(left / caps))
    return int(caps[best]), float(left[best])


def _capped(sizes: _Ints, cap: int) -> float:
    return float((sizes * np.minimum(np.arange(len(sizes)), cap)).sum())


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


def _all_seen(strata: Sequence[DrawnStratum], seen: _Floats, total: float) -> bool:
    return all(len(s.wrong) >= s.images for s in strata) and bool(seen.sum() < total)

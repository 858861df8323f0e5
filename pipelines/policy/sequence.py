"""Which accept thresholds hold: thresholds tested from the strictest down, classes by Holm.

Learn then test (Angelopoulos et al. 2021): thresholds are tested in an order fixed beforehand, and
the first that fails ends the sequence, so no threshold costs the others confidence. Where the
sequence starts depends on accepted counts alone, never on what people said. Errors are expected to
grow with what is accepted: a third of the permitted ones at least, all of them where two thirds of
the boxes are accepted that score half of the highest score or more. The start is the strictest
threshold that nine of ten simulated draws with so many errors would show; failing that, the one
with the most accepted boxes to be expected; failing that, the strictest that a draw without errors
would show, or none.

Classes share the risk equally, and a class whose sequence went through to its end passes its share
on to those that remain (Holm's procedure, extended to sequences by Bretz et al. 2009).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.betting import DrawnStratum, log_capital

GRID = np.round(np.arange(0.98, 0.049, -0.02), 2)  # raw scores, the strictest first
_SIMULATED, _FEW = 30, 6  # draws; fewer where hardly any is enough
_SURE = 0.9  # of the simulated draws
_LEAST_SURE = 0.2
_FEWEST = 1 / 3  # of the permitted errors, expected at any threshold
_GROWTH = 1.5
_MOST_WITHOUT_REPLACEMENT = 10**9  # numpy's limit
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AuditedStratum:
    """One stratum of a run at every threshold of ``GRID``, for one class or all.

    Attributes:
        sizes: int64 [G, L], images with 0 to L - 1 accepted boxes, by threshold.
        wrong: int64 [G, n], wrong accepted boxes of the drawn images, in random order.
        accepted: int64 [G, n], accepted boxes of the drawn images.
    """

    sizes: _Ints
    wrong: _Ints
    accepted: _Ints

    def at(self, g: int) -> DrawnStratum:
        """Return the stratum at one threshold."""
        return DrawnStratum(self.sizes[g], self.accepted[g], self.wrong[g])


@dataclass(frozen=True, slots=True)
class Proven:
    """Result of a sequence of tests.

    Attributes:
        lowest: index into ``GRID`` of the lowest threshold that holds; None: none was shown to.
        start: where the sequence began; None: the draw is too small for any threshold.
    """

    lowest: int | None
    start: int | None


def prove(
    strata: Sequence[AuditedStratum], target: float, risk: float, start: int | None
) -> Proven:
    """Test from ``start`` down until one fails, each at ``risk``."""
    lowest = None
    for g in range(len(GRID) if start is None else start, len(GRID)):
        if log_capital([s.at(g) for s in strata], target) < -np.log(risk):
            break
        lowest = g
    return Proven(lowest, start)


def prove_classes(
    classes: Mapping[str, Sequence[AuditedStratum]], target: float, risk: float
) -> dict[str, Proven]:
    """Return every class's sequence, all their statements together at ``risk``."""
    open_ = {name: risk / len(classes) for name in classes}
    found: dict[str, Proven] = {}
    while open_:
        tested = {
            name: prove(classes[name], target, share, start_of(classes[name], target, share))
            for name, share in open_.items()
        }
        found |= tested
        through = [name for name, one in tested.items() if one.lowest == len(GRID) - 1]
        freed = sum(open_.pop(name) for name in through)
        if not through or not open_:
            break
        open_ = {name: share + freed / len(open_) for name, share in open_.items()}
    return found


def start_of(
    strata: Sequence[AuditedStratum], target: float, risk: float, *, draws: Sequence[int] = ()
) -> int | None:
    """Return the first threshold to test; None: even a draw without errors would show none.

    Args:
        strata: only their sizes and the number of drawn images are looked at.
        target, risk: of the statement.
        draws: images to draw from each stratum instead of those that were.
    """
    counts = list(draws) or [s.wrong.shape[1] for s in strata]
    accepted = np.sum([s.sizes @ np.arange(s.sizes.shape[1]) for s in strata], axis=0)  # [G]
    held = np.flatnonzero(accepted)
    if not len(held):
        return None
    half = int(np.argmin(np.abs(GRID - GRID[held[0]] / 2)))
    shown: dict[int, float] = {}
    for g in range(held[0], half):
        errors = max(_FEWEST, _GROWTH * float(accepted[g] / accepted[half]))
        shown[g] = _shown(strata, g, counts, target, risk, errors)
        if shown[g] >= _SURE:
            return g
    likely = {g: found * float(accepted[g]) for g, found in shown.items() if found >= _LEAST_SURE}
    if likely:
        return max(likely, key=lambda g: likely[g])
    clean = (g for g in held if _shown(strata, g, counts, target, risk, 0.0) >= 1 / 2)
    return next(map(int, clean), None)


def _shown(
    strata: Sequence[AuditedStratum],
    g: int,
    counts: Sequence[int],
    target: float,
    risk: float,
    share: float,
) -> float:
    """Return the share of simulated draws that are enough, with so many of the permitted errors."""
    if share * (1 - target) >= 1:
        return 0.0
    rng = np.random.default_rng(g)

    def enough(share: float) -> bool:
        drawn = []
        for s, n in zip(strata, counts, strict=True):
            accepted = _drawn(s.sizes[g], n, rng)
            wrong = rng.binomial(accepted, share * (1 - target))
            drawn.append(DrawnStratum(s.sizes[g], accepted, wrong))
        return bool(log_capital(drawn, target) >= -np.log(risk))

    few = sum(enough(share) for _ in range(_FEW))
    if few < _FEW / 5:
        return few / _FEW
    return (few + sum(enough(share) for _ in range(_SIMULATED - _FEW))) / _SIMULATED


def would_do(
    strata: Sequence[AuditedStratum],
    g: int,
    counts: Sequence[int],
    target: float,
    risk: float,
    share: float,
) -> bool:
    """Return whether nine of ten draws with this share of the permitted errors would be enough.

    Draws have sizes ``counts`` and are simulated from the accepted counts at threshold ``g``.
    """
    return _shown(strata, g, counts, target, risk, share) >= _SURE


def _drawn(sizes: _Ints, n: int, rng: np.random.Generator) -> _Ints:
    """Return the accepted boxes [n] of n images drawn without replacement."""
    if sizes.sum() < _MOST_WITHOUT_REPLACEMENT:
        counts = rng.multivariate_hypergeometric(sizes, n)
    else:  # drawing the same image twice is negligible in a population of this size
        counts = rng.multinomial(n, sizes / sizes.sum())
    return rng.permutation(np.repeat(np.arange(len(sizes)), counts))

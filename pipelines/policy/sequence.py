"""Which accept thresholds hold: thresholds tested from the strictest down, classes by Holm.

Learn then test (Angelopoulos et al. 2021): thresholds are tested in an order fixed beforehand, and
the first that fails ends the sequence, so no threshold costs the others confidence. Where the
sequence starts depends on accepted counts alone, never on what people said: at the strictest
threshold where three of four draws of this size would show that a third of the permitted errors is
not too many; failing that, that a sixth is not, or none.

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
_SIMULATED = 25
_EXPECTED = (1 / 3, 1 / 6, 0.0)  # shares of the permitted errors
_SURE = 0.75  # of the simulated draws
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
        return DrawnStratum(self.sizes[g], self.wrong[g])


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
    hopeful = [
        g
        for g in range(len(GRID))
        if sum(int(s.sizes[g, 1:].sum()) for s in strata)
        and _Draws(strata, g, counts, target, risk).enough(0.0)
    ]
    for share in _EXPECTED:
        for g in hopeful:
            if would_do(strata, g, counts, target, risk, share):
                return g
    return None


def would_do(
    strata: Sequence[AuditedStratum],
    g: int,
    counts: Sequence[int],
    target: float,
    risk: float,
    share: float,
) -> bool:
    """Return whether three of four draws with this share of the permitted errors would be enough.

    Draws have sizes ``counts`` and are simulated from the accepted counts at threshold ``g``.
    """
    if share * (1 - target) >= 1:
        return False
    draws = _Draws(strata, g, counts, target, risk)
    if not draws.enough(0.0) or not share:
        return not share and draws.enough(0.0)
    failed = 0
    for _ in range(_SIMULATED):
        failed += not draws.enough(share)
        if failed > (1 - _SURE) * _SIMULATED:
            return False
    return True


class _Draws:
    """Simulated draws at one threshold, the same ones every time."""

    def __init__(
        self,
        strata: Sequence[AuditedStratum],
        g: int,
        counts: Sequence[int],
        target: float,
        risk: float,
    ) -> None:
        self._strata = [(s.sizes[g], n) for s, n in zip(strata, counts, strict=True)]
        self._target, self._needed = target, -np.log(risk)
        self._rng = np.random.default_rng(g)

    def enough(self, share: float) -> bool:
        """Return whether the next draw, with this share of the permitted errors, would do."""
        drawn = []
        for sizes, n in self._strata:
            accepted = self._rng.choice(len(sizes), n, p=sizes / sizes.sum())
            wrong = self._rng.binomial(accepted, share * (1 - self._target))
            drawn.append(DrawnStratum(sizes, wrong))
        return bool(log_capital(drawn, self._target) >= self._needed)

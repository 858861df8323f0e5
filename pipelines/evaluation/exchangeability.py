"""A test of "the new images are like the old ones" that may be looked at after every image.

A new image's statistic is ranked among those of the reference and of the new images before it
(online conformal p-values, Vovk, Gammerman and Shafer 2005); as long as all are exchangeable the
p-values are independent and uniform. A gambler bets against that. Its capital is a non-negative
martingale, so it exceeds 1 / risk with a probability of at most risk, however often one looks
(Ville's inequality). With several statistics each capital has to exceed their number / risk.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_EXPONENTS = np.array([0.2, 0.4, 0.6, 0.8])
_STRATEGIES = 4 * len(_EXPONENTS)


def _log_bets(p: float) -> Floats:
    """Return each strategy's log growth: power bets on small, large, outer and inner p-values."""
    inner = abs(2.0 * p - 1.0)
    sides = np.clip(np.array([p, 1.0 - p, inner, 1.0 - inner]), 1e-12, 1.0)
    grown = np.log(_EXPONENTS)[None] + (_EXPONENTS - 1.0)[None] * np.log(sides)[:, None]
    return np.asarray(grown.reshape(-1), np.float64)


@dataclass(slots=True)
class Gambler:
    """One capital, shared equally between fixed strategies; starts at 1.

    Attributes:
        log_capital: now. ``most``: the largest so far. ``bets``: how many p-values it saw.
    """

    bets: int = 0
    log_capital: float = 0.0
    most: float = 0.0
    _strategies: Floats = field(default_factory=lambda: np.zeros(_STRATEGIES))

    def bet(self, p: float) -> None:
        """See the next p-value."""
        self._strategies += _log_bets(p)
        top = float(self._strategies.max())
        mean = float(np.mean(np.exp(self._strategies - top)))
        self.log_capital = top + float(np.log(mean))
        self.most = max(self.most, self.log_capital)
        self.bets += 1


class RankTest:
    """New values of one statistic against a reference.

    Args:
        reference: float64 [N], at least one.
        rng: breaks ties.
    """

    def __init__(self, reference: Floats, rng: np.random.Generator) -> None:
        self._sorted: list[float] = sorted(reference.tolist())
        self._rng = rng
        self.gambler = Gambler()

    def see(self, value: float) -> None:
        """See the next new value."""
        below = bisect_left(self._sorted, value)
        equal = bisect_right(self._sorted, value) - below
        place = below + self._rng.random() * (equal + 1)
        self.gambler.bet(place / (len(self._sorted) + 1))
        insort(self._sorted, value)


class SignTest:
    """Differences of one statistic on the same images: as often up as down, if nothing changed."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.gambler = Gambler()

    def see(self, difference: float) -> None:
        """See the next difference; one of 0 tells nothing."""
        u = float(self._rng.random())
        self.gambler.bet(u if difference == 0 else (u / 2 if difference < 0 else 0.5 + u / 2))

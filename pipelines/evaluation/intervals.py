"""Confidence intervals for ratios of totals, from a stratified sample of images.

Precision and recall are ratios of box counts, but images were drawn, not boxes: boxes of one image
are right or wrong together. So the ratio's variance is taken over images (linearised, with the
inclusion probabilities as weights), turned into an effective number of boxes, and that into a
Clopper-Pearson interval, as Korn and Graubard (1998) do for surveys: it stays inside [0, 1] and has
a sensible width even where no error was seen.

Audits are small and errors bunch in few images, so three corrections lean to the safe side; how
often the interval then covers the truth is measured by ``benchmarks/audit_coverage.py``:

- residuals are divided by 1 - leverage (the jackknife's variance, as HC3), since an image with
  many boxes pulls the ratio towards itself;
- degrees of freedom are those of the effective number of images, (sum y)^2 / sum y^2;
- one invented image, as large as the image a random box is in, stands for what the sample did not
  happen to show, once mostly wrong and once mostly right; the interval reported is the hull (the
  images' counterpart of Agresti and Coull's invented observations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_VAGUE = 100.0  # an upper end this many times the lower one says nothing
_Z = 1.959963984540054
_INVENTED = (0.25, 0.75)  # shares of its boxes that are right


@dataclass(frozen=True, slots=True)
class Sample:
    """A simple random sample of one stratum's images.

    Attributes:
        images: in the stratum.
        x, y: float64 [k], the ratio's numerator and denominator in each sampled image.
    """

    images: int
    x: NDArray[np.float64]
    y: NDArray[np.float64]

    @property
    def share(self) -> float:
        """Sampled share of the stratum."""
        return min(1.0, len(self.y) / self.images)

    @property
    def weight(self) -> float:
        """Images that each sampled one stands for: one over its inclusion probability."""
        return max(1.0, self.images / len(self.y))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; ``value`` is None where nothing was seen to divide by."""

    value: float | None
    low: float
    high: float

    @property
    def vague(self) -> bool:
        """Whether the interval spans so much that its ends would only mislead."""
        return self.value is None or vague(self.low, self.high)

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def vague(low: float, high: float) -> bool:
    """Return whether an interval of a rate spans so much that its ends would only mislead."""
    return not np.isfinite(high) or (low > 0 and high > _VAGUE * low)


def plain(value: float) -> str:
    """Return a figure as people write it: three digits that count, no exponent."""
    if not np.isfinite(value):
        return "unbounded"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2f}"


UNKNOWN = Estimate(None, 0.0, 1.0)


def share_estimate(samples: Sequence[Sample]) -> Estimate:
    """Estimate sum(x) / sum(y) with 0 <= x <= y, over all strata, with its interval.

    Strata without a sample must be left out; the estimate then does not speak for them.
    """
    strata = [s for s in samples if len(s.y)]
    total = sum(s.weight * float(s.y.sum()) for s in strata)
    if total <= 0:
        return UNKNOWN
    value = sum(s.weight * float(s.x.sum()) for s in strata) / total
    if all(s.share >= 1 for s in strata):
        return Estimate(value, value, value)  # everything was seen
    if sum(len(s.y) for s in strata) < 2:
        return Estimate(value, 0.0, 1.0)
    low, high = _share_interval(strata, total, value)
    return Estimate(value, min(low, value), max(high, value))


def rate_estimate(samples: Sequence[Sample]) -> Estimate:
    """Estimate an unbounded ratio of totals, such as errors per minute; log-normal interval."""
    strata = [s for s in samples if len(s.y)]
    total = sum(s.weight * float(s.y.sum()) for s in strata)
    if total <= 0:
        return Estimate(None, 0.0, float("inf"))
    value = sum(s.weight * float(s.x.sum()) for s in strata) / total
    if value == 0:
        # Nothing found: the rule of three, for the stratum whose images weigh most.
        return Estimate(0.0, 0.0, 3.0 * max(s.weight for s in strata) / total)
    half = _t(_effective(strata)) * np.sqrt(_variance(strata, total, value)) / value
    return Estimate(value, float(value * np.exp(-half)), float(value * np.exp(half)))


def quotient(a: Estimate, b: Estimate) -> Estimate:
    """a / b for independent rates: their widths on the log scale add in squares."""
    if a.value is None or b.value is None or b.value == 0:
        return Estimate(None, 0.0, float("inf"))
    value = a.value / b.value
    if value == 0:
        return Estimate(0.0, 0.0, a.high / b.low if b.low else float("inf"))
    half = np.hypot(np.log(a.high / a.value), np.log(b.high / b.value))
    return Estimate(value, float(value * np.exp(-half)), float(value * np.exp(half)))


def _share_interval(strata: Sequence[Sample], total: float, value: float) -> tuple[float, float]:
    """Return the hull of the intervals without and with invented images, never a narrower one."""
    images, seen = sum(s.images for s in strata), sum(len(s.y) for s in strata)
    unseen = max(0.0, 1.0 - seen / images)
    size = sum(s.weight * float((s.y**2).sum()) for s in strata) / total
    # Between the mean weight and that of the stratum which was sampled least.
    weight = (images / seen + max(s.weight for s in strata)) / 2
    invented = unseen * weight * size
    more = total + invented
    found = [_interval(strata, value, _variance(strata, total, value))]
    for right in _INVENTED:
        centre = (value * total + invented * right) / more
        residual = invented * (right - centre) / (1 - invented / more)
        variance = _variance(strata, more, centre) + unseen * (residual / more) ** 2
        found.append(_interval(strata, centre, variance))
    return min(low for low, _ in found), max(high for _, high in found)


def _interval(strata: Sequence[Sample], centre: float, variance: float) -> tuple[float, float]:
    n = float(sum(int((s.y > 0).sum()) for s in strata))
    if variance > 0:
        n = centre * (1 - centre) / variance * (_Z / _t(_effective(strata))) ** 2
    return _clopper_pearson(centre, max(n, 1.0))


def _variance(strata: Sequence[Sample], total: float, value: float) -> float:
    """Linearised variance of the ratio over images, finite populations respected."""
    out = 0.0
    for s in strata:
        k = len(s.y)
        leverage = np.minimum(s.weight * s.y / total, 0.9)
        residual = s.weight * (s.x - value * s.y) / (1 - leverage)
        spread = residual - residual.mean() if k > 1 else residual
        out += (1 - s.share) * k / max(k - 1, 1) * float((spread**2).sum())
    return out / total**2


def _effective(strata: Sequence[Sample]) -> float:
    """Degrees of freedom: the effective number of images less one a stratum, at least 1."""
    weighted = np.concatenate([s.weight * s.y for s in strata])
    images = float(weighted.sum() ** 2 / (weighted**2).sum())
    return max(1.0, images - len(strata))


def _t(df: float) -> float:
    from scipy.stats import t  # type: ignore[import-untyped]  # scipy ships no types

    return float(t.ppf(0.5 + LEVEL / 2, df))


def _clopper_pearson(share: float, n: float) -> tuple[float, float]:
    from scipy.stats import beta

    right, wrong, tail = share * n, (1 - share) * n, (1 - LEVEL) / 2
    low = float(beta.ppf(tail, right, wrong + 1)) if right > 0 else 0.0
    high = float(beta.ppf(1 - tail, right + 1, wrong)) if wrong > 0 else 1.0
    return low, high

"""Cost of human review: the stated cost model, the budget, and a fit to lead times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.errors import ConfigError

SU_2012 = "Su et al. 2012 (HCOMP): coverage check 7.8 s, drawing a box 25.5 s, medians"
PAPADOPOULOS = (
    "Papadopoulos et al. 2016 (CVPR): 1.6 s to verify a box; 2017 (ICCV): 7.0 s to draw one"
)
_MIN_ANSWERS = 20


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of human time, linear in what there is to do.

    Attributes:
        per_image_s: open it, look it over for what is missing, submit.
        per_box_s: check one box that is shown.
        per_correction_s: move, relabel, delete or draw one.
        source: where the figures come from.
    """

    per_image_s: float = 7.8
    per_box_s: float = 1.6
    per_correction_s: float = 7.0
    source: str = f"{PAPADOPOULOS}; {SU_2012}"

    def seconds(
        self, shown: NDArray[Any] | float, corrections: NDArray[Any] | float
    ) -> NDArray[np.float64]:
        """Expected seconds per image, for boxes shown and corrections (scalars or arrays)."""
        total = self.per_image_s + self.per_box_s * np.asarray(shown, np.float64)
        return np.asarray(total + self.per_correction_s * np.asarray(corrections, np.float64))

    def to_fields(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget of human review: a count of images, or minutes."""

    amount: float
    unit: Literal["images", "minutes"]

    @staticmethod
    def parse(text: str) -> Budget:
        """``500 images`` or ``240 minutes``. Raises ConfigError for anything else."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(image|minute)s?\s*", text)
        if found is None:
            raise ConfigError(
                f"a review budget of {text!r}", hint="write `500 images` or `240 minutes`"
            )
        return Budget(float(found[1]), "images" if found[2] == "image" else "minutes")

    @property
    def units(self) -> float:
        """Images, or seconds."""
        return float(int(self.amount)) if self.unit == "images" else self.amount * 60.0

    def price(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what each image takes from the budget: 1, or its seconds."""
        return np.ones_like(seconds) if self.unit == "images" else seconds

    def __str__(self) -> str:
        amount = int(self.amount) if float(self.amount).is_integer() else self.amount
        return f"{amount} {self.unit}"


def learn_cost(
    shown: Sequence[float],
    corrections: Sequence[float],
    lead_times_s: Sequence[float],
    *,
    fallback: CostModel,
) -> CostModel:
    """Return the cost model that Label Studio's lead times speak for.

    Non-negative least squares of lead time on (1, boxes shown, corrections). Lead time counts an
    open tab over lunch as work, so answers beyond three times the median of the first fit's ratio
    are left out and the fit is made again.

    Args:
        shown, corrections, lead_times_s: one each an answer.
        fallback: returned as it is where there are fewer than 20 answers with a lead time.
    """
    from scipy.optimize import nnls  # type: ignore[import-untyped]  # scipy ships no types

    seconds = np.asarray(lead_times_s, np.float64)
    work = np.column_stack([np.ones(len(seconds)), shown, corrections]).astype(np.float64)
    usable = np.isfinite(seconds) & (seconds > 0)
    work, seconds = work[usable], seconds[usable]
    if len(seconds) < _MIN_ANSWERS:
        return fallback
    assumed = work @ (fallback.per_image_s, fallback.per_box_s, fallback.per_correction_s)
    ratio = seconds / assumed
    kept = ratio <= 3 * np.median(ratio)
    coefficients, _ = nnls(work[kept], seconds[kept])
    per_image, per_box, per_correction = (float(c) for c in coefficients)
    return CostModel(per_image, per_box, per_correction, f"lead times of {int(kept.sum())} answers")

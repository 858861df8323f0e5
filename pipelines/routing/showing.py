"""Which boxes of a routed image a reviewer is shown: those that cost less shown than hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.box_batch import BoxBatch
from pipelines.policy.one_object import winners
from pipelines.policy.policy import Policy
from pipelines.routing.cost import CostModel

Show = Literal["auto", "score", "none"]
ONE_PLACE = 0.8  # IoU from which boxes lie at one place, whatever their classes


def pays_above(cost: CostModel) -> float:
    """Return the probability of being right above which showing a box costs less than hiding it.

    ``CostModel.seconds`` is linear, so each box can be looked at alone. With ``b`` seconds to check
    a box that is shown, ``c`` seconds for a correction, and a box that is right with probability
    ``p``:

        shown    b + (1 - p) c    check it; where it is wrong, delete it
        hidden   p c              where it is right, draw it

    Shown costs less exactly when ``p > (b + c) / (2 c)``: 0.614 at 1.6 s and 7 s, 0.676 at 9 s and
    25.5 s. Where checking costs as much as drawing, no box pays: 1 is returned.
    """
    if cost.per_correction_s <= cost.per_box_s:
        return 1.0
    return (cost.per_box_s + cost.per_correction_s) / (2 * cost.per_correction_s)


@dataclass(frozen=True, slots=True)
class ShowRule:
    """What a reviewer sees of an image's boxes; recorded with the queue part.

    Attributes:
        how: ``auto``: boxes that are right with more than ``above``; ``score``: boxes that the
            policy accepts; ``none``: no boxes, people draw from scratch; ``all``: everything from
            ``reject`` up, as in queue parts of older versions.
        above: a probability; used by ``auto``.
    """

    how: Literal["auto", "score", "none", "all"] = "all"
    above: float = 0.0

    @staticmethod
    def choose(show: Show, cost: CostModel) -> ShowRule:
        """Return the rule for ``review.show`` at this cost of people's time."""
        return ShowRule(show, pays_above(cost) if show == "auto" else 0.0)

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> ShowRule:
        """Read what ``to_fields`` wrote; queue parts of older versions have no fields."""
        return ShowRule(**fields)

    def to_fields(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @property
    def hides(self) -> bool:
        """Return whether some boxes are hidden, so that an answer does not cover all of them."""
        return self.how in ("auto", "score")

    def shown(self, batch: BoxBatch) -> NDArray[np.bool_]:
        """bool [N]: boxes to show; of several at one place the likeliest, whatever its class."""
        if self.how == "none":
            return np.zeros(len(batch.image), np.bool_)
        if self.how == "all":
            return batch.standing
        wanted = batch.accepted if self.how == "score" else batch.right > self.above
        wanted = wanted & ~batch.outside & ~batch.alternative
        rank = np.empty(len(batch.image), np.int64)
        rank[np.argsort(-batch.right, kind="stable")] = np.arange(len(batch.image))
        hidden_by = winners(batch.image, batch.boxes, rank, wanted, ONE_PLACE)
        return np.asarray(wanted & (hidden_by < 0))

    def seconds(self, batch: BoxBatch, cost: CostModel) -> NDArray[np.float64]:
        """Human time by image: to check what is shown, to correct what is wrong or missing.

        Not the corrections that a look is worth: a right box in the uncertain band is worth one,
        and costs one only where it is hidden.
        """
        shown = self.shown(batch)
        to_draw = np.where(batch.alternative, 0.0, batch.right)  # another box has the same object
        to_correct = np.where(shown, 1.0 - batch.right, to_draw)
        return cost.seconds(batch.per_image(shown), batch.per_image(to_correct))

    def says(self, policy: Policy) -> str:
        """Return what a task tells its reviewer about its boxes; the same for audit images."""
        if self.how == "none":
            return "no boxes: draw everything"
        if self.how == "all":
            return ""
        if self.how == "score":
            return "only boxes that would become labels: draw what is missing"
        return (
            f"only boxes that are right with a probability above {self.above:.0%}"
            f"{'' if policy.calibration else ' (estimated)'}: draw what is missing"
        )

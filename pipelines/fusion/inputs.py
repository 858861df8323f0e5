"""One run as fusion sees it: its class names mapped, its scores calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.fusion.boxes import Votes
from pipelines.policy.policy import Policy, Thresholds
from storage.boxes import clipped, has_area
from storage.errors import ConfigError
from storage.records import AnnotationRow
from storage.runs.manifest import Manifest


@dataclass(frozen=True, slots=True)
class FusionInput:
    """A run that is fused.

    Attributes:
        manifest: the run.
        to_fused: int64 [its classes], id in the fused run; -1: the class is left out.
        knows: bool [fused classes], whether the run's model has the class.
        calibration: what makes its scores probabilities; None: they count as they are.
        weight: how much the run counts.
        shown: its name for people, see ``distinct_names``.
    """

    manifest: Manifest
    to_fused: NDArray[np.int64]
    knows: NDArray[np.bool_]
    calibration: Thresholds | None
    weight: float
    shown: str

    @property
    def name(self) -> str:
        """The run's name; two runs may have the same."""
        return self.manifest.record.identity.name

    def settings(self) -> dict[str, Any]:
        """Return the parts of the run that affect a fused box, as JSON values."""
        identity = self.manifest.record.identity
        curves = self.calibration.curves if self.calibration else None
        by_class = None
        if curves is not None:
            by_class = [curve.model_dump(mode="json") for curve in curves]
        view = self.manifest.record.inference.get("view")
        return {
            "name": identity.name,
            "config_hash": identity.config_hash,
            "model_sha256": identity.model_sha256,
            "weight": self.weight,
            "classes": self.to_fused.tolist(),
            "calibration": by_class,
            **({} if view is None else {"view": view}),
        }

    def votes(self, row: AnnotationRow) -> tuple[Votes, NDArray[np.int64]]:
        """Return the votes of one row, and the index of each vote's box in the row.

        Boxes are clipped to the image; those without area there do not vote.
        """
        found = row.detections
        ids = self.to_fused[found.category_ids.astype(np.int64)]
        boxes = clipped(found.boxes.astype(np.float64), row.width, row.height)
        scores = found.scores.astype(np.float64)
        if self.calibration is not None:
            scores = self.calibration.probability(found.scores, found.category_ids)
        kept = np.flatnonzero(has_area(boxes) & (ids >= 0))
        return Votes(boxes[kept], scores[kept], ids[kept], self.knows, self.weight), kept


def class_map(
    manifest: Manifest, fused: list[str], renamed: Mapping[str, str]
) -> NDArray[np.int64]:
    """Return the fused id of each of a run's classes; -1 where it is left out.

    Args:
        fused: class names of the fused run.
        renamed: a name of the run by the fused name; '' leaves the class out.

    Raises:
        ConfigError: a name stands for no class of the fused run.
    """
    own = [c.name for c in manifest.record.identity.categories]
    wanted = [renamed.get(name, name) for name in own]
    unknown = [name for name, to in zip(own, wanted, strict=True) if to and to not in fused]
    if unknown:
        raise ConfigError(
            f"{manifest.url} has classes that the first run lacks: {', '.join(unknown)}",
            hint=f"--map '{unknown[0]}=NAME' for each, where NAME is one of {', '.join(fused)}; "
            f"--map '{unknown[0]}=' leaves it out",
        )
    return np.array([fused.index(to) if to else -1 for to in wanted], np.int64)


def calibration_of(manifest: Manifest) -> Thresholds | None:
    """Return the calibration that ``fit`` left with a run; None: it has none.

    Raises:
        ConfigError: the policy there is damaged, or that of another model.
    """
    policy = Policy.of_run(manifest.store, manifest.url)
    if policy is None or policy.calibration is None:
        return None
    return policy.for_run(manifest.record.identity)

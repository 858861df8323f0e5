"""Check a model on labelled images, and find the likely cause if it fails.

A detector that gets its images in the wrong channel order, badly placed, at another size than it
was trained with, or whose classes are named in another order runs without any error and labels
badly. Each of these has a trial: the same images with that one setting changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from pipelines.truth.matching import iou_matrix, match
from storage.records import Detections

Setting = Literal["channels", "letterbox", "image_size", "classes"]

_OVERLAP = 0.5  # IoU from which a box counts as found, whatever its class
_HELPS = 0.05  # mAP that a trial must gain to be named where none passes


@dataclass(frozen=True, slots=True)
class Trial:
    """The mAP with one setting changed.

    Attributes:
        setting: what was changed.
        change: into what, in words.
        remedy: what to write into the config.
        map_: 0 to 1.
    """

    setting: Setting
    change: str
    remedy: str
    map_: float


@dataclass(frozen=True, slots=True)
class GateResult:
    """A model measured against a mark.

    Attributes:
        map_, min_map: 0 to 1; the model passes from ``min_map`` on.
        images: how many images it was measured on.
        named: how many the ground truth names.
        truth: the ground truth's URL.
        settings: how images were prepared, in words.
        unknown_to_model: classes of the ground truth's boxes that the model lacks: not measured.
        trials: what was tried once it had failed, best first.
        trial_images: how many images each trial ran on.
        trial_base: mAP of the config as it is on those.
    """

    map_: float
    min_map: float
    images: int
    named: int
    truth: str
    settings: str
    unknown_to_model: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    trial_images: int = 0
    trial_base: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the mark is reached."""
        return self.map_ >= self.min_map

    @property
    def would_pass(self) -> tuple[Trial, ...]:
        """The trials that reach the mark, best first."""
        return tuple(trial for trial in self.trials if trial.map_ >= self.min_map)

    @property
    def cause(self) -> Trial | None:
        """The likely cause: the best trial, if it reaches the mark or comes clearly nearer."""
        best = next(iter(self.trials), None)
        if best is None or best.map_ >= self.min_map:
            return best
        return best if best.map_ >= self.trial_base + _HELPS else None

    @property
    def verdict(self) -> str:
        """The result on one line."""
        on = f"on {self.images} images of {self.truth}"
        if self.images < self.named:
            on = f"on the {self.images} readable of {self.named} images of {self.truth}"
        if self.unknown_to_model:
            on += f" without the classes that the model lacks ({', '.join(self.unknown_to_model)})"
        if self.passed:
            return f"mAP {self.map_:.3f} {on}: passes {self.min_map:g}"
        return f"mAP {self.map_:.3f} {on}: below the {self.min_map:g} that is asked for"

    @property
    def advice(self) -> str:
        """What to do about a failure."""
        if self.cause is None:
            return (
                "other channels, letterbox, image sizes and class orders do no better: check the "
                f"checkpoint, the ground truth, and the preprocessing ({self.settings})"
            )
        cause = self.cause
        short = "" if cause.map_ >= self.min_map else ", which is still too little"
        return (
            f"likely cause: {cause.setting.replace('_', ' ')}. With {cause.change} the mAP is "
            f"{cause.map_:.3f}{short}: {cause.remedy}"
        )

    def to_fields(self) -> dict[str, Any]:
        """Return the result for machines."""
        cause = self.cause
        return {
            "passed": self.passed,
            "mAP": round(self.map_, 5),
            "min_map": self.min_map,
            "images": self.images,
            "named": self.named,
            "truth": self.truth,
            "settings": self.settings,
            "unknown_to_model": list(self.unknown_to_model),
            "cause": None if self.passed or cause is None else cause.setting,
            "would_pass": [trial.setting for trial in self.would_pass],
            "trial_images": self.trial_images,
            "trial_base": round(self.trial_base, 5),
            "trials": [_trial_json(trial) for trial in self.trials],
            "advice": None if self.passed else self.advice,
        }


def _trial_json(trial: Trial) -> dict[str, Any]:
    fields = asdict(trial)
    return {**fields, "mAP": round(fields.pop("map_"), 5)}


def gate_table(result: GateResult) -> RenderableType:
    """Render the verdict, every trial, and the advice."""
    lines = [Text(result.verdict, "bold green" if result.passed else "bold red")]
    if result.passed:
        return Group(*lines)
    lines.append(Text(f"images are prepared as: {result.settings}"))
    if result.trials:
        base = f"as configured {result.trial_base:.3f}"
        lines.append(Text(f"tried on {result.trial_images} images ({base}):"))
    for trial in result.trials:
        mark = " (would pass)" if trial.map_ >= result.min_map else ""
        lines.append(Text(f"  {trial.map_:.3f}  {trial.change}{mark}"))
    lines.append(Text(result.advice))
    return Group(*lines)


def best_order(
    found: Sequence[Detections], truth: Sequence[Sequence[dict[str, Any]]], classes: int
) -> NDArray[np.int64]:
    """Return the class that each output most likely stands for.

    Boxes are matched to the truth by their place alone; the order is the assignment that agrees
    with most of the score (Kuhn 1955, the Hungarian method).

    Args:
        found: detections of each image, in its pixels.
        truth: COCO annotations of each image, category ids from 1, as ``truth_box`` makes them.
        classes: how many there are.

    Returns:
        int64 [classes]: a permutation; outputs that were never seen keep their place where it is
        free.
    """
    agree = np.zeros((classes, classes))
    for one, boxes in zip(found, truth, strict=True):
        counted = [box for box in boxes if not box.get("ignore") and not box.get("iscrowd")]
        if not counted or not len(one):
            continue
        corners = np.array([box["bbox"] for box in counted], np.float64)
        corners[:, 2:] += corners[:, :2]
        rows, columns = match(iou_matrix(one.boxes.astype(np.float64), corners), _OVERLAP)
        ids = np.array([box["category_id"] - 1 for box in counted])[columns]
        np.add.at(agree, (one.category_ids[rows], ids), one.scores[rows])
    # A little for the own place: what was never seen stays where it is.
    favoured = agree + 1e-6 * np.eye(classes)
    _, order = linear_sum_assignment(favoured, maximize=True)
    return np.asarray(order, np.int64)

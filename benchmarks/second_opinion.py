"""What is a second opinion worth? Two runs over the same images, and their fusion.

    python -m benchmarks.second_opinion RUN_A RUN_B --truth COCO [--json FILE]

The runs are fused as `labelfleet fuse --raw` does. Printed are the mAP of both runs and of the
fusion, and, for the boxes that RUN_A voted for, how well three things tell those that are right at
IoU 0.5 and 0.75 from the others (area under the ROC curve): RUN_A's score alone, the agreement
alone, and a logistic regression on both, cross-validated ten-fold by image. RUN_B may be a model of
its own, or a view (`model.view`) of RUN_A's. "In doubt" are the boxes with a score of RUN_A between
0.3 and 0.7.

`routing` is the share of an oracle's gain over random that routing takes, as
benchmarks/review_value measures it (default policy, quick cost model, 20 % of the time, no fit): on
RUN_A alone, and on the fusion without and with the signal `disagreement`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from benchmarks.review_value import COSTS, POLICY, RANDOM_ORDERS, SHARE, copy_of, review, spend
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.fusion.fuse import fuse_runs
from pipelines.fusion.record import FuseOptions
from pipelines.routing.cost import Budget
from pipelines.routing.route import route
from pipelines.routing.signals import SIGNALS, Weighted
from pipelines.routing.survey import RouteOptions
from pipelines.truth.judge import TrueBoxes, truth_images
from pipelines.truth.matching import iou_matrix, match
from storage.coco.truth import read_truth
from storage.records import Detections
from storage.review.queue import read_queue
from storage.runs.manifest import RUN_KEY, Manifest, RunRecord
from storage.stores.memory import MemoryStore

LEAST_SCORE = 0.1  # below it hardly a box is right, and any signal would look good
DOUBT = (0.3, 0.7)
FOLDS = 10
Floats = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs=2)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure([Manifest.open(url) for url in args.runs], args.truth)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)


def measure(runs: Sequence[Manifest], truth: Path) -> dict[str, Any]:
    """Return mAP of each run and of the fusion, and AUROC of score, agreement and both."""
    output = MemoryStore()
    fuse_runs(runs, output, FuseOptions(calibrated=False))
    fused = Manifest(output, RunRecord.from_json(output.get(RUN_KEY)))
    names = ("A", "B", "fusion")
    evaluated = [evaluate_run(run, truth, allow_missing=True) for run in (*runs, fused)]
    found: dict[str, Any] = {
        "mAP": {n: _rounded(e.map_) for n, e in zip(names, evaluated, strict=True)},
        "mAP50": {n: _rounded(e.map50) for n, e in zip(names, evaluated, strict=True)},
    }
    found["routing"] = {
        "A": _routing(runs[0], truth, SIGNALS),
        "fusion without disagreement": _routing(
            fused, truth, {k: v for k, v in SIGNALS.items() if k != "disagreement"}
        ),
        "fusion": _routing(fused, truth, SIGNALS),
    }
    rows = list(truth_images(fused, read_truth(truth), allow_missing=True))
    for iou in (0.5, 0.75):
        parts = [_boxes(row.detections, true, iou) for row, true in rows]
        images = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
        score, agreement, right = (np.concatenate([p[k] for p in parts]) for k in range(3))
        doubt = (score >= DOUBT[0]) & (score < DOUBT[1])
        for name, which in (("", np.ones_like(doubt)), (", in doubt", doubt)):
            found[f"AUROC at IoU {iou}{name}"] = _aurocs(
                score[which], agreement[which], right[which] > 0, images[which]
            )
    return found


def _routing(manifest: Manifest, truth: Path, signals: Mapping[str, Weighted]) -> float:
    """Return the share of the oracle's gain that routing by these signals takes."""
    images, cost = review(manifest, read_truth(truth)), COSTS["quick"]
    by_id = {image.image_id: image for image in images}
    budget_s = SHARE * sum(image.seconds(cost) for image in images)
    copied = Manifest(copy_of(manifest), manifest.record)
    minutes = Budget(budget_s / SHARE / 60, "minutes")
    route(copied, POLICY, "all", RouteOptions(minutes, 0.0, 0, cost, signals=signals))
    queued = [item.image_id for item in read_queue(copied.store)]
    ours = [by_id[image_id] for image_id in queued if image_id in by_id]
    rng = np.random.default_rng(0)
    random = [[images[i] for i in rng.permutation(len(images))] for _ in range(RANDOM_ORDERS)]
    oracle = sorted(images, key=lambda i: -i.errors.errors / i.seconds(cost))
    by_chance = float(np.mean([spend(o, cost, budget_s)["per_minute"] for o in random]))
    most, got = (spend(o, cost, budget_s)["per_minute"] for o in (oracle, ours))
    return round((got - by_chance) / (most - by_chance), 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _boxes(found: Detections, true: TrueBoxes, iou: float) -> tuple[Floats, Floats, Floats]:
    """Score, agreement and rightness of the boxes that run A voted for and the truth judges."""
    if not len(found) or found.run_scores is None or found.agreement is None:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    right = _right(found, true, iou)
    score = np.asarray(found.run_scores, np.float64)[:, 0]
    counts = true.counts(found.boxes, found.category_ids) & (np.nan_to_num(score) >= LEAST_SCORE)
    return score[counts], found.agreement[counts].astype(np.float64), right[counts]


def _right(found: Detections, true: TrueBoxes, least: float) -> Floats:
    """1 where a box is the first, by score, on a true box of its class."""
    same = found.category_ids[:, None] == true.category_ids[None]
    right = np.zeros(len(found))
    right[match(np.where(same, iou_matrix(found.boxes, true.boxes), 0.0), least)[0]] = 1
    return right


def _aurocs(
    score: Floats, agreement: Floats, right: NDArray[np.bool_], images: NDArray[np.int64]
) -> dict[str, float]:
    clipped = np.clip(score, 1e-6, 1 - 1e-6)
    features = np.column_stack([np.log(clipped / (1 - clipped)), agreement])
    both = cross_val_predict(
        LogisticRegression(), features, right, groups=images,
        cv=GroupKFold(min(FOLDS, len(np.unique(images)))), method="predict_proba",
    )[:, 1]  # fmt: skip
    named = {"score": score, "agreement": agreement, "both": both}
    areas = {name: round(float(roc_auc_score(right, values)), 4) for name, values in named.items()}
    return {"boxes": len(right), "right": int(right.sum()), **areas}


if __name__ == "__main__":
    main()

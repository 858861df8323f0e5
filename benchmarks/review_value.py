"""What routing is worth: errors found per minute, against random, lowest mean score and an oracle.

    python -m benchmarks.review_value NAME=RUN,TRUTH.json [NAME=RUN,TRUTH.json ...] [--json FILE]

RUN is the output of a labelling run by a weak teacher, TRUTH the COCO ground truth of its images.
Ground truth plays the reviewer. An image's errors are what a person would correct in its labels at
the accept threshold: missed, spurious, misplaced (IoU below 0.5), wrong class. Its cost is what the
cost model says of the boxes shown (accepted and uncertain) and of the corrections those need. Every
strategy orders all images and spends 20 % of what reviewing everything would cost.

Fixed before anything was measured: the policy (accept 0.7, reject 0.1, the defaults), the share of
20 %, and two cost models. ``quick``: 7.8 s an image (coverage check, Su et al. 2012), 1.6 s a box
shown (Papadopoulos et al. 2016), 7.0 s a correction (extreme clicking, Papadopoulos et al. 2017).
``careful``: 7.8 s, 9.0 s a box (quality verification) and 25.5 s a correction (drawing), all three
Su et al. 2012.

- random: the mean over a hundred orders; the bracket is the middle 90 % of them.
- lowest mean score: Label Studio's Uncertainty sampling, mean score of the shown boxes.
- ours: the product's own routing without its audit share; ``with audit``: a fifth of it random.
- oracle: knows errors and costs, and takes the most errors per second first.

How much of the oracle's gain can be known at all is printed beside it: boxes are drawn right or
wrong, independently, with the share that is right at their score in this very ground truth
(isotonic regression); whoever knows those shares exactly is compared with an oracle that knows the
draw.

Each set is read twice: with ground truth as it is, and ``untouched boxes forgiven``, where a
predicted box that touches no true box (IoU below 0.1) is neither an error nor work. Where ground
truth lacks objects, such boxes are mostly objects that nobody labelled: an oracle finds the images
with the laziest annotators, which no model could know.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.cost import Budget, CostModel
from pipelines.matching import Corrections, compare, iou_matrix, match
from pipelines.policy import Decision, Policy, Thresholds
from pipelines.route import route
from pipelines.survey import RouteOptions
from pipelines.truth import Truth, is_ignore_class, join_rows, match_categories, read_truth
from storage.manifest import Manifest
from storage.memory import MemoryStore
from storage.records import AnnotationRow
from storage.review_queue import read_queue
from storage.rows import live_rows

POLICY = Policy(accept=0.7, reject=0.1)
SHARE = 0.2
RANDOM_ORDERS = 100
COSTS = {
    "quick": CostModel(7.8, 1.6, 7.0, "Su 2012, Papadopoulos 2016 and 2017"),
    "careful": CostModel(7.8, 9.0, 25.5, "Su 2012"),
}


@dataclass(frozen=True)
class Reviewed:
    """One image as the reviewer would find it.

    Attributes:
        scores, right: of every counted box of the model, and whether it is right.
        errors: in its labels at the accept threshold.
        shown, corrections: boxes shown, and what those need.
        mean_score: of the shown boxes; 0 without any.
    """

    image_id: str
    scores: NDArray[np.float32]
    right: NDArray[np.bool_]
    errors: Corrections
    shown: int
    corrections: int
    mean_score: float

    def seconds(self, cost: CostModel) -> float:
        """What reviewing it takes."""
        return float(cost.seconds(self.shown, self.corrections))


def review(manifest: Manifest, truth: Truth, *, forgive: bool = False) -> list[Reviewed]:
    """Every image of the run that the ground truth knows; ``forgive`` boxes that touch none."""
    rows = [row for row in live_rows(manifest) if row.status == "ok"]
    joined = join_rows(truth, [(row.image_id, row.shard_id) for row in rows])
    categories = manifest.record.identity.categories
    thresholds = POLICY.thresholds(categories)
    ids = match_categories([c.name for c in categories], truth.categories)
    return [
        _reviewed(row, truth, joined.image_of_row[row.image_id], ids, thresholds, forgive)
        for row in rows
        if row.image_id in joined.image_of_row
    ]


def _reviewed(
    row: AnnotationRow,
    truth: Truth,
    image: int,
    ids: dict[int, int],
    thresholds: Thresholds,
    forgive: bool,
) -> Reviewed:
    d = row.detections
    boxes = [b for b in truth.boxes[image] if not _ignored(truth, b.category_id, b.ignore)]
    regions = [b for b in truth.boxes[image] if _ignored(truth, b.category_id, b.ignore)]
    true = _xyxy([b.xywh for b in boxes])
    true_ids = np.array([ids[b.category_id] for b in boxes], np.int64)
    counted = ~_inside(d.boxes, _xyxy([b.xywh for b in regions]))
    if forgive:
        counted &= (iou_matrix(d.boxes, true) >= 0.1).any(axis=1)
    decided = thresholds.decide(d.scores, d.category_ids, queued=True)
    accepted = counted & (decided == Decision.ACCEPT)
    shown = counted & (decided >= Decision.REVIEW)
    iou = iou_matrix(d.boxes[counted], true)
    same = d.category_ids[counted][:, None] == true_ids[None, :]
    right = np.zeros(int(counted.sum()), np.bool_)
    right[match(np.where(same, iou, 0.0), 0.5)[0]] = True
    return Reviewed(
        row.image_id,
        d.scores[counted],
        right,
        compare(d.boxes[accepted], d.category_ids[accepted], true, true_ids),
        int(shown.sum()),
        compare(d.boxes[shown], d.category_ids[shown], true, true_ids).errors,
        float(d.scores[shown].mean()) if shown.any() else 0.0,
    )


def _ignored(truth: Truth, category_id: int, ignore: bool) -> bool:
    return ignore or is_ignore_class(truth.categories[category_id])


def _xyxy(xywh: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    at = np.array(xywh, np.float64).reshape(-1, 4)
    return np.concatenate([at[:, :2], at[:, :2] + at[:, 2:]], axis=1)


def _inside(boxes: NDArray[Any], regions: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Boxes whose centre lies in a region that is not to be counted."""
    centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    within = (centre >= regions[None, :, :2]) & (centre <= regions[None, :, 2:])
    return np.asarray(within.all(axis=2).any(axis=1))


Order = list[Reviewed]


def orders(
    images: list[Reviewed], manifest: Manifest, cost: CostModel, seeds: Sequence[int]
) -> dict[str, list[Order]]:
    """Every strategy's order of review, one a seed."""
    by_id = {image.image_id: image for image in images}

    def shuffled(seed: int) -> Order:
        return [images[i] for i in np.random.default_rng(seed).permutation(len(images))]

    def ours(seed: int, audit: float) -> Order:
        store = _copy(manifest)
        copied = Manifest(store, manifest.record)
        everything = sum(i.seconds(cost) for i in images) / 60
        # Routing expects costs, the reviewer pays them: where time is left, a second queue follows.
        first = RouteOptions(Budget(everything * SHARE, "minutes"), audit, seed, cost)
        second = RouteOptions(Budget(everything, "minutes"), 0.0, seed, cost)
        route(copied, POLICY, "first", first)
        route(copied, POLICY, "second", second)
        return [by_id[item.image_id] for item in read_queue(store) if item.image_id in by_id]

    return {
        "random": [shuffled(seed) for seed in range(RANDOM_ORDERS)],
        "lowest mean score": [sorted(shuffled(s), key=lambda i: i.mean_score) for s in seeds],
        "ours": [ours(seed, 0.0) for seed in seeds],
        "ours, with audit": [ours(seed, 0.2) for seed in seeds],
        "oracle": [sorted(images, key=lambda i: -i.errors.errors / i.seconds(cost))],
    }


def _copy(manifest: Manifest) -> MemoryStore:
    """The run without what people made of it: routing must not touch the original."""
    store = MemoryStore()
    for prefix in ("run.json", "source/", "annotations/"):
        for listed in manifest.store.list(prefix):
            store.create(listed.key, manifest.store.get(listed.key))
    return store


def spend(order: Order, cost: CostModel, budget_s: float) -> dict[str, float]:
    """Errors found in order until the next image does not fit: per minute and per 100 images."""
    spent, errors, images = 0.0, 0, 0
    for image in order:
        seconds = image.seconds(cost)
        if spent + seconds > budget_s:
            break
        spent, errors, images = spent + seconds, errors + image.errors.errors, images + 1
    return {
        "errors": errors,
        "images": images,
        "minutes": spent / 60,
        "per_minute": errors / (spent / 60) if spent else 0.0,
        "per_100_images": 100 * errors / images if images else 0.0,
    }


def knowable(images: list[Reviewed], cost: CostModel, draws: int = 100) -> float:
    """Share of the oracle's gain for one who knows how often boxes of each score are right."""
    from sklearn.isotonic import IsotonicRegression

    scores, right = (np.concatenate([getattr(i, f) for i in images]) for f in ("scores", "right"))
    fitted = IsotonicRegression(out_of_bounds="clip").fit(scores, right)
    chances = [fitted.predict(i.scores) if len(i.scores) else i.scores for i in images]
    known = np.array([_worth(i, p, cost) for i, p in zip(images, chances, strict=True)])
    rng, shares = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = [rng.random(len(p)) < p for p in chances]
        real = np.array([_worth(i, r, cost) for i, r in zip(images, drawn, strict=True)])
        random = np.mean([_rate(real, rng.permutation(len(real))) for _ in range(30)])
        oracle = _rate(real, _best_first(real))
        shares.append((_rate(real, _best_first(known)) - random) / (oracle - random))
    return float(np.mean(shares))


def _worth(image: Reviewed, right: NDArray[Any], cost: CostModel) -> tuple[float, float]:
    """(errors, seconds) of an image whose boxes are right so far."""
    accepted, shown = image.scores >= POLICY.accept, image.scores >= POLICY.reject
    errors = (1 - 1.0 * right)[accepted].sum() + right[~accepted].sum()
    mended = (1 - 1.0 * right)[shown].sum() + right[~shown].sum()
    return float(errors), float(cost.seconds(shown.sum(), mended))


def _best_first(worth: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.argsort(-worth[:, 0] / worth[:, 1], kind="stable")


def _rate(worth: NDArray[np.float64], order: NDArray[Any]) -> float:
    """Errors a second within the budget."""
    spent = np.cumsum(worth[order, 1])
    n = max(1, int((spent <= SHARE * worth[:, 1].sum()).sum()))
    return float(worth[order[:n], 0].sum() / spent[n - 1])


def measure(
    name: str, manifest: Manifest, truth: Truth, seeds: Sequence[int], *, forgive: bool
) -> dict[str, Any]:
    """All strategies under both cost models; printed as they come."""
    images = review(manifest, truth, forgive=forgive)
    total = sum((image.errors for image in images), Corrections())
    print(
        f"\n{name}: {len(images)} images, {total.true} objects, {total.predicted} labels; errors: "
        f"{total.missed} missed, {total.spurious} spurious, {total.misplaced} misplaced, "
        f"{total.wrong_class} of wrong class"
    )
    found: dict[str, Any] = {"images": len(images), "errors": total.errors}
    for cost_name, cost in COSTS.items():
        everything = sum(image.seconds(cost) for image in images)
        print(f"  {cost_name} cost: all images {everything / 60:.0f} min, "
              f"budget {everything * SHARE / 60:.0f} min")  # fmt: skip
        rows = {
            strategy: [spend(order, cost, everything * SHARE) for order in made]
            for strategy, made in orders(images, manifest, cost, seeds).items()
        }
        found[cost_name] = _print_rows(rows)
        found[cost_name]["knowable"] = knowable(images, cost)
        print(f"    of the oracle's gain can be known: {found[cost_name]['knowable']:.2f}")
    return found


def _print_rows(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    def mean(strategy: str, figure: str) -> float:
        return float(np.mean([row[figure] for row in rows[strategy]]))

    random, oracle = mean("random", "per_minute"), mean("oracle", "per_minute")
    out: dict[str, Any] = {}
    print(f"    {'':20s}{'errors/min':>11s}  {'range':15s}{'errors/100 images':>18s}"
          f"{'images':>8s}{'of the gain':>13s}")  # fmt: skip
    for strategy, runs in rows.items():
        rates = [run["per_minute"] for run in runs]
        low, high = np.percentile(rates, [5, 95])
        gain = (mean(strategy, "per_minute") - random) / (oracle - random) if oracle > random else 0
        print(
            f"    {strategy:20s}{np.mean(rates):11.2f}  [{low:5.2f}, {high:5.2f}] "
            f"{mean(strategy, 'per_100_images'):18.0f}{mean(strategy, 'images'):8.0f}{gain:13.2f}"
        )
        out[strategy] = {"runs": runs, "share_of_oracle_gain": gain}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN,TRUTH.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for text in options.runs:
        name, _, places = text.partition("=")
        run, _, truth = places.partition(",")
        for forgive in (False, True):
            called = f"{name}, untouched boxes forgiven" if forgive else name
            found[called] = measure(
                called, Manifest.open(run), read_truth(truth), range(options.seeds), forgive=forgive
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

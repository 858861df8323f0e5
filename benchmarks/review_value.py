"""What routing is worth: errors found per minute, against random, lowest mean score and an oracle.

    python -m benchmarks.review_teachers DATA TEACHERS     makes the weak teachers and their runs
    python -m benchmarks.review_value TEACHERS [--part test|tune] [--json FILE]

TEACHERS/<set>-<seed> holds the labelling runs of a weak teacher and the COCO ground truth of their
images. What is chosen is chosen on ``tune``; ``test`` is for the figures.
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
- ours, fitted: likewise, after ``labelfleet fit`` on ground truth of the other part, which stands
  for an audit as large as that; thresholds stay at the same raw scores.
- oracle: knows errors and costs, and takes the most errors per second first.

How much of the oracle's gain can be known at all is printed beside it: boxes are drawn right or
wrong, independently, with the share that is right at their score in this very ground truth
(isotonic regression); a policy that knows them exactly is compared with an oracle that knows the
draw.

``--shown`` measures what showing boxes costs people instead: seconds an image over all images of
the part, with the boxes shown from ``reject`` up, with none, with those that the product shows
(``review.show: auto`` with the built-in prior, and fitted on the other part), and with those above
the score that would have been best here. A right box that is hidden has to be drawn.

Each set is read twice: with ground truth as it is, and ``untouched boxes forgiven``, where a
predicted box that touches no true box (IoU below 0.1) is neither an error nor work. Where ground
truth lacks objects, such boxes are mostly unlabelled objects: an oracle finds the images
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

from pipelines.policy.box_batch import box_batch
from pipelines.policy.fit import fit_run
from pipelines.policy.policy import ClassThresholds, Curve, Decision, Policy, Thresholds
from pipelines.routing.cost import Budget, CostModel
from pipelines.routing.route import route
from pipelines.routing.showing import ShowRule
from pipelines.routing.survey import RouteOptions
from pipelines.truth.judge import TrueBoxes, truth_images
from pipelines.truth.matching import Corrections, compare, iou_matrix
from storage.coco.truth import Truth, read_truth
from storage.records import AnnotationRow
from storage.review.queue import read_queue
from storage.runs.annotation_rows import rows_to_table
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore

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
        """Return what reviewing it takes."""
        return float(cost.seconds(self.shown, self.corrections))


def review(manifest: Manifest, truth: Truth, *, forgive: bool = False) -> list[Reviewed]:
    """Return every image of the run that the ground truth knows; ``forgive`` boxes that touch
    none."""
    thresholds = POLICY.thresholds(manifest.record.identity.categories)
    rows = truth_images(manifest, truth, allow_missing=True)
    return [_reviewed(row, true, thresholds, forgive) for row, true in rows]


def _reviewed(
    row: AnnotationRow, true: TrueBoxes, thresholds: Thresholds, forgive: bool
) -> Reviewed:
    d = row.detections
    counted = true.counts(d.boxes, d.category_ids)
    if forgive:
        counted &= (iou_matrix(d.boxes, true.boxes) >= 0.1).any(axis=1)
    decided = thresholds.decide(d.scores, d.category_ids, queued=True)
    accepted = counted & (decided == Decision.ACCEPT)
    shown = counted & (decided >= Decision.REVIEW)

    def errors(which: NDArray[np.bool_]) -> Corrections:
        return compare(d.boxes[which], d.category_ids[which], true.boxes, true.category_ids)

    return Reviewed(
        row.image_id,
        d.scores[counted],
        true.right(d.boxes[counted], d.category_ids[counted]),
        errors(accepted),
        int(shown.sum()),
        errors(shown).errors,
        float(d.scores[shown].mean()) if shown.any() else 0.0,
    )


Order = list[Reviewed]


def orders(
    images: list[Reviewed],
    manifest: Manifest,
    cost: CostModel,
    seeds: Sequence[int],
    fitted: Policy | None,
) -> dict[str, list[Order]]:
    """Return every strategy's order of review, one a seed."""
    by_id = {image.image_id: image for image in images}

    def shuffled(seed: int) -> Order:
        return [images[i] for i in np.random.default_rng(seed).permutation(len(images))]

    def ours(seed: int, audit: float, policy: Policy = POLICY) -> Order:
        store = copy_of(manifest)
        copied = Manifest(store, manifest.record)
        everything = sum(i.seconds(cost) for i in images) / 60
        # Routing expects costs, the reviewer pays them: where time is left, a second queue follows.
        first = RouteOptions(Budget(everything * SHARE, "minutes"), audit, seed, cost)
        second = RouteOptions(Budget(everything, "minutes"), 0.0, seed, cost)
        route(copied, policy, "first", first)
        route(copied, policy, "second", second)
        return [by_id[item.image_id] for item in read_queue(store) if item.image_id in by_id]

    found = {
        "random": [shuffled(seed) for seed in range(RANDOM_ORDERS)],
        "lowest mean score": [sorted(shuffled(s), key=lambda i: i.mean_score) for s in seeds],
        "ours": [ours(seed, 0.0) for seed in seeds],
        "ours, with audit": [ours(seed, 0.2) for seed in seeds],
    }
    if fitted is not None:
        found["ours, fitted"] = [ours(seed, 0.0, fitted) for seed in seeds]
    found["oracle"] = [sorted(images, key=lambda i: -i.errors.errors / i.seconds(cost))]
    return found


def human_cost(manifest: Manifest, truth: Truth, fitted: Policy | None) -> dict[str, Any]:
    """Return seconds an image and boxes shown an image, by cost model and by what is shown."""
    rows = list(truth_images(manifest, truth, allow_missing=True))
    found: dict[str, Any] = {"images": len(rows)}
    for name, cost in COSTS.items():
        auto = ShowRule.choose("auto", cost)
        rules: dict[str, tuple[ShowRule, Policy]] = {
            "from reject up": (ShowRule(), POLICY.model_copy(update={"one_object": None})),
            "none": (ShowRule("none"), POLICY),
            "auto, prior": (auto, POLICY),
        }
        if fitted is not None:
            rules["auto, fitted"] = (auto, fitted)
        found[name] = {said: _shown(manifest, rows, *rule, cost) for said, rule in rules.items()}
        tried = [
            _shown(manifest, rows, ShowRule("score"), Policy(accept=float(at), reject=0.05), cost)
            | {"score": float(at)}
            for at in np.arange(0.1, 1.0, 0.05)
        ]
        found[name]["best score, in hindsight"] = min(tried, key=lambda one: one["seconds"])
    return found


def _shown(
    manifest: Manifest,
    rows: Sequence[tuple[AnnotationRow, TrueBoxes]],
    rule: ShowRule,
    policy: Policy,
    cost: CostModel,
) -> dict[str, float]:
    thresholds = policy.thresholds(manifest.record.identity.categories)
    seconds, shown = [], []
    for row, true in rows:
        d = row.detections
        batch = box_batch(rows_to_table([row]), thresholds)
        seen = np.flatnonzero(rule.shown(batch) & true.counts(d.boxes, d.category_ids))
        needed = compare(
            d.boxes[seen], d.category_ids[seen], true.boxes, true.category_ids
        ).errors  # fmt: skip
        seconds.append(float(cost.seconds(len(seen), needed)))
        shown.append(len(seen))
    return {"seconds": float(np.mean(seconds)), "shown": float(np.mean(shown))}


def _print_cost(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}, {found['images']} images: seconds an image (boxes shown)")
    for cost in COSTS:
        told = (
            f"{said} {one['seconds']:.0f} s ({one['shown']:.1f})"
            + (f" at {one['score']:.2f}" if "score" in one else "")
            for said, one in found[cost].items()
        )
        print(f"  {cost}: {'; '.join(told)}")


def fitted_on(manifest: Manifest, truth: Truth) -> Policy:
    """Return the policy that ``fit`` gives, with POLICY's thresholds on the raw scores."""
    policy = fit_run(manifest, truth).policy
    assert policy.calibration is not None
    names = [c.name for c in manifest.record.identity.categories]
    curves = {n: _rising(policy.calibration.classes.get(n, policy.calibration.all)) for n in names}
    at = {name: curve(np.array([POLICY.accept, POLICY.reject])) for name, curve in curves.items()}
    classes = {name: ClassThresholds(accept=a, reject=r) for name, (a, r) in at.items()}
    calibration = policy.calibration.model_copy(update={"classes": curves})
    return policy.model_copy(update={"classes": classes, "calibration": calibration})


def _rising(curve: Curve) -> Curve:
    """Return the curve, its level steps tilted a little: a threshold on a step would take all of
    it."""
    tilted = (0.999 * p + 0.001 * s for s, p in zip(curve.scores, curve.probabilities, strict=True))
    return Curve(scores=curve.scores, probabilities=tuple(tilted))


def copy_of(manifest: Manifest) -> MemoryStore:
    """Return the run without what people made of it: routing must not touch the original."""
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
    corrected = (1 - 1.0 * right)[shown].sum() + right[~shown].sum()
    return float(errors), float(cost.seconds(shown.sum(), corrected))


def _best_first(worth: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.argsort(-worth[:, 0] / worth[:, 1], kind="stable")


def _rate(worth: NDArray[np.float64], order: NDArray[Any]) -> float:
    """Errors a second within the budget."""
    spent = np.cumsum(worth[order, 1])
    n = max(1, int((spent <= SHARE * worth[:, 1].sum()).sum()))
    return float(worth[order[:n], 0].sum() / spent[n - 1])


def measure(
    name: str,
    manifest: Manifest,
    truth: Truth,
    seeds: Sequence[int],
    fitted: Policy | None,
    *,
    forgive: bool,
) -> dict[str, Any]:
    """Return all strategies under both cost models; printed as they come."""
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
            for strategy, made in orders(images, manifest, cost, seeds, fitted).items()
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


def summarise(found: dict[str, dict[str, Any]]) -> None:
    """Each set's mean over its teachers, with the range of the shares of the oracle's gain."""
    sets = sorted({name.rsplit("-", 1)[0] for name in found})
    for name in sets:
        teachers = [found[key] for key in found if key.rsplit("-", 1)[0] == name]
        print(f"\n{name}: mean of {len(teachers)} teachers")
        for cost in COSTS:
            print(f"  {cost} cost")
            for strategy in (k for k in teachers[0][cost] if k != "knowable"):
                made = [t[cost][strategy] for t in teachers]
                runs = [run for one in made for run in one["runs"]]
                gains = [one["share_of_oracle_gain"] for one in made]
                means = (np.mean([r[f] for r in runs]) for f in ("per_minute", "per_100_images"))
                print("    {:20s}{:8.2f} a minute{:8.0f} in 100 images   of the gain {:.2f} "
                      "[{:.2f}, {:.2f}]".format(strategy, *means, np.mean(gains), min(gains),
                                                max(gains)))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teachers", type=Path)
    parser.add_argument("--part", choices=("test", "tune"), default="test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shown", action="store_true", help="What showing boxes costs people.")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    forgiven: dict[str, dict[str, Any]] = {}
    for folder in sorted(p for p in options.teachers.iterdir() if (p / options.part).is_dir()):
        parts = {
            part: (Manifest.open(str(folder / part)), read_truth(folder / f"{part}.json"))
            for part in ("tune", "test")
        }
        other = "tune" if options.part == "test" else "test"
        # Nothing is ever fitted on test.
        fitted = fitted_on(*parts[other]) if other == "tune" else None
        run, truth = parts[options.part]
        if options.shown:
            # Curves as `fit` makes them: the rule compares probabilities.
            own = fit_run(*parts[other]).policy if other == "tune" else None
            found[folder.name] = human_cost(run, truth, own)
            _print_cost(folder.name, found[folder.name])
            continue
        seeds = range(options.seeds)
        found[folder.name] = measure(folder.name, run, truth, seeds, fitted, forgive=False)
        name = f"{folder.name}, untouched boxes forgiven"
        forgiven[folder.name] = measure(name, run, truth, seeds, fitted, forgive=True)
    if options.shown:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    summarise(found)
    print("\nuntouched boxes forgiven:")
    summarise(forgiven)
    if options.json:
        options.json.write_text(json.dumps({"all": found, "forgiven": forgiven}, indent=1) + "\n")


if __name__ == "__main__":
    main()

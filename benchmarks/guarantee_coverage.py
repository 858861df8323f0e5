"""How often a guarantee is broken, and how much it accepts: simulated audits, and bccd.

    python -m benchmarks.guarantee_coverage [--audits 2000] [--images 150] [--json FILE]
    python -m benchmarks.guarantee_coverage --run RUN --truth COCO [--images 60] [--audits 200]

The first form draws audits from the clustered populations of ``audit_coverage`` (4,000 images each;
right boxes score higher than wrong ones on average) and asks for 90, 95 and 99 % with 90 %
confidence. A guarantee is broken when fewer boxes than stated are right, of all that the threshold
accepts in the whole population; that may happen in at most 10 % of audits.

The second form takes a labelled run whose images all have ground truth, draws audits of them, and
compares the accepted boxes with those of the lowest threshold that the full truth allows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.audit_coverage import Population, populations
from pipelines.policy.guarantee import accepted_counts
from pipelines.policy.sequence import GRID, AuditedStratum, prove, start_of
from pipelines.truth.audit_images import sampled_truth
from storage.coco.truth import read_truth
from storage.runs.manifest import Manifest

TARGETS = (0.9, 0.95, 0.99)
RISK = 0.1
Counts = NDArray[np.int64]


class Threshed:
    """A population at every threshold: accepted and wrong boxes, int64 [G, images]."""

    def __init__(self, accepted: Counts, wrong: Counts) -> None:
        self.accepted, self.wrong = accepted, wrong
        longest = int(accepted.max()) + 1
        self.sizes = np.array([np.bincount(row, minlength=longest) for row in accepted])
        total = accepted.sum(axis=1)
        self.right = 1 - wrong.sum(axis=1) / np.maximum(total, 1)
        self.total = total

    @property
    def images(self) -> int:
        return self.accepted.shape[1]

    def audit(self, order: Counts) -> list[AuditedStratum]:
        """Return what an audit of these images sees, in their order."""
        return [AuditedStratum(self.sizes, self.wrong[:, order], self.accepted[:, order])]


def scored(population: Population, rng: np.random.Generator) -> Threshed:
    """Scores for a population's boxes: Beta(5, 2) for right ones, Beta(2, 4) for wrong ones."""
    right, boxes = population
    image = np.repeat(np.arange(len(boxes)), boxes)
    first = np.arange(len(image)) - np.repeat(np.cumsum(boxes) - boxes, boxes)
    is_right = first < np.repeat(right, boxes)
    scores = np.where(is_right, rng.beta(5, 2, len(image)), rng.beta(2, 4, len(image)))
    scores = scores.astype(np.float32)
    return Threshed(
        accepted_counts(scores, image, len(boxes)),
        accepted_counts(scores[~is_right], image[~is_right], len(boxes)),
    )


def try_audits(
    population: Threshed, target: float, images: int, audits: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Share of audits whose guarantee is broken, and of those that give one; boxes accepted."""
    possible = np.flatnonzero(population.right >= target)
    best = int(population.total[possible].max(initial=0))
    start = start_of(population.audit(np.arange(images)), target, RISK)
    broken, given, accepted = 0, 0, []
    for _ in range(audits):
        order = rng.permutation(population.images)[:images]
        held = prove(population.audit(order), target, RISK, start).lowest
        given += held is not None
        broken += held is not None and bool(population.right[held] < target)
        accepted.append(0 if held is None else int(population.total[held]))
    return {
        "target": target,
        "broken": broken / audits,
        "given": given / audits,
        "of_the_possible": float(np.mean(accepted)) / best if best else 0.0,
        "start": None if start is None else float(GRID[start]),
    }


def of_run(run: str, truth: str) -> Threshed:
    """Return a labelled run whose images have ground truth."""
    found = sampled_truth(Manifest.open(run), read_truth(truth))
    image = np.repeat(np.arange(len(found)), [len(one.scores) for one in found])
    scores = np.concatenate([one.scores for one in found])
    right = np.concatenate([one.right for one in found])
    return Threshed(
        accepted_counts(scores, image, len(found)),
        accepted_counts(scores[~right], image[~right], len(found)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--audits", type=int, default=2000)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--run")
    parser.add_argument("--truth")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    if options.run:
        tried = {options.run: of_run(options.run, options.truth)}
    else:
        tried = {name: scored(one, rng) for name, one in populations(rng).items()}
    rows = []
    print(f"{'population':26s} target  broken   given  of the possible")
    for name, population in tried.items():
        for target in options.targets:
            row = try_audits(population, target, options.images, options.audits, rng)
            rows.append({"population": name, "images": options.images, **row})
            print(f"{name[-26:]:26s}{target:7.2f}{row['broken']:8.3f}{row['given']:8.3f}"
                  f"{row['of_the_possible']:12.2f}", flush=True)  # fmt: skip
    print(f"broken at most: {max(row['broken'] for row in rows):.3f}")
    if options.json:
        options.json.write_text(
            json.dumps({"audits": options.audits, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

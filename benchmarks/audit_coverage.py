"""How often the audit's 95 % interval covers the truth: 1,000 draws from each of many populations.

    python benchmarks/audit_coverage.py [--draws 1000] [--json FILE] [--plot FILE]

Each population is 4,000 images with a count of accepted boxes and of right ones; the truth is their
ratio over all images. Each draw samples images at random and asks for the interval, as the report
does. ``two strata`` samples two invocations' images with unequal inclusion probabilities.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.intervals import Sample, share_estimate

IMAGES = 4000
SIZES = (30, 60, 150)
Counts = NDArray[np.int64]
Population = tuple[Counts, Counts]  # right, all


def _binomial(
    boxes: Counts, p: NDArray[np.float64] | float, rng: np.random.Generator
) -> Population:
    return rng.binomial(boxes, p), boxes


def populations(rng: np.random.Generator) -> dict[str, Population]:
    """Named populations, from easy to hostile."""
    n = IMAGES
    ten, eight = rng.poisson(10, n), rng.poisson(8, n)
    skewed = rng.negative_binomial(1, 1 / 9, n)
    wild = rng.negative_binomial(0.5, 0.5 / 8, n)

    def hard(share: float, p: float) -> NDArray[np.float64]:
        return np.where(rng.random(n) < share, p, 0.98)

    return {
        "all alike, 0.90": _binomial(ten, 0.9, rng),
        "all alike, 0.99": _binomial(ten, 0.99, rng),
        "all alike, 0.998": _binomial(ten, 0.998, rng),
        "differing images, 0.80": _binomial(eight, rng.beta(4, 1, n), rng),
        "differing images, 0.95": _binomial(eight, rng.beta(9.5, 0.5, n), rng),
        "all or nothing, 0.90": _binomial(eight, rng.beta(0.45, 0.05, n), rng),
        "low, 0.20": _binomial(eight, rng.beta(1, 4, n), rng),
        "1 in 10 images hard": _binomial(ten, hard(0.10, 0.4), rng),
        "1 in 20 images hard": _binomial(ten, hard(0.05, 0.3), rng),
        "one box an image": _binomial(rng.poisson(1, n), 0.9, rng),
        "mostly empty images": _binomial(rng.poisson(0.3, n), 0.9, rng),
        "sizes very uneven": _binomial(skewed, rng.beta(4, 1, n), rng),
        "large images worse": _binomial(wild, np.clip(1 - wild / 100, 0.3, 1) * 0.97, rng),
    }


def draw_simple(population: Population, k: int, rng: np.random.Generator) -> list[Sample]:
    """One stratum, ``k`` images."""
    right, boxes = population
    at = rng.choice(len(boxes), k, replace=False)
    return [Sample(len(boxes), right[at].astype(float), boxes[at].astype(float))]


def draw_strata(population: Population, k: int, rng: np.random.Generator) -> list[Sample]:
    """Two invocations: a quarter of the images is sampled with two thirds of the audit."""
    right, boxes = population
    cut, out = len(boxes) // 4, []
    for low, high, size in ((0, cut, 2 * k // 3), (cut, len(boxes), k - 2 * k // 3)):
        at = low + rng.choice(high - low, size, replace=False)
        out.append(Sample(high - low, right[at].astype(float), boxes[at].astype(float)))
    return out


Draw = Callable[[Population, int, np.random.Generator], list[Sample]]
DESIGNS: dict[str, Draw] = {"one stratum": draw_simple, "two strata": draw_strata}


def coverage(
    population: Population, k: int, draw: Draw, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """(share of draws whose interval covers the truth, mean width)."""
    truth = population[0].sum() / population[1].sum()
    covered, width = 0, 0.0
    for _ in range(draws):
        found = share_estimate(draw(population, k, rng))
        covered += found.low <= truth <= found.high
        width += found.high - found.low
    return covered / draws, width / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    rows: list[dict[str, Any]] = []
    print(f"{'population':26s}{'truth':>7s}  design       images  covered  mean width")
    for name, population in populations(rng).items():
        truth = float(population[0].sum() / population[1].sum())
        for design, draw in DESIGNS.items():
            for k in SIZES:
                share, width = coverage(population, k, draw, options.draws, rng)
                rows.append(
                    {"population": name, "truth": truth, "design": design, "images": k,
                     "covered": share, "width": width}
                )  # fmt: skip
                print(f"{name:26s}{truth:7.3f}  {design:12s}{k:7d}{share:9.3f}{width:12.3f}")
    worst = min(rows, key=lambda row: row["covered"])
    below = sum(row["covered"] < 0.93 for row in rows)
    print(
        f"worst: {worst['covered']:.3f} ({worst['population']}, {worst['design']}, "
        f"{worst['images']} images); {below} of {len(rows)} below 0.93"
    )
    if options.json:
        options.json.write_text(json.dumps({"draws": options.draws, "rows": rows}, indent=1) + "\n")
    if options.plot:
        _plot(rows, options.plot)


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines."""


def _plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(str(row["population"]) for row in rows))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for design, marker in zip(DESIGNS, "os", strict=True):
        for k, colour in zip(SIZES, ("#9ecae1", "#4292c6", "#08519c"), strict=True):
            chosen = [r for r in rows if r["design"] == design and r["images"] == k]
            axes.scatter(
                [float(str(r["covered"])) for r in chosen],
                [names.index(str(r["population"])) for r in chosen],
                marker=marker, color=colour, label=f"{design}, {k} images",
            )  # fmt: skip
    axes.axvline(0.95, color="black", linewidth=0.8)
    axes.axvline(0.93, color="firebrick", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("share of draws whose 95 % interval covers the truth")
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

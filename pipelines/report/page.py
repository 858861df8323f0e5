"""The run's report: one self-contained HTML page with counts, charts and annotated images.

The page loads nothing, runs no script, and escapes everything that came from file names and
labels. Its content comes from scan.py (rows), pace.py (ledger), gallery.py (pictures) and review.py
(corrections); its layout is assets/report.html.j2.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from pipelines.display.durations import shown_duration
from pipelines.display.palette import color_of
from pipelines.evaluation.intervals import Estimate, plain, vague
from pipelines.evaluation.result import Evaluation, diagnosis_facts, remarks
from pipelines.policy.policy import Policy
from pipelines.report import figures
from pipelines.report.gallery import Tile, draw_tiles, legend
from pipelines.report.misses import worst_misses
from pipelines.report.pace import Pace, newest_pace
from pipelines.report.review import review_section
from pipelines.report.scan import BANDS, BOX_BUCKETS, SCORE_BINS, SHOWN_SCORE, Pick, Scan, scan
from storage.errors import LabelfleetError
from storage.objects.protocols import StorageOptions
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.stores.open import open_store

REPORT_KEY = "report/index.html"
_GALLERY = 27  # images, a third each least certain, most certain and random
_MAX_CLASSES = 24
_MAX_SHOWN = 50

_GROUPS = (
    ("least", "Least certain", "highest mean score entropy of their boxes"),
    ("most", "Most certain", "lowest mean score entropy of their boxes"),
    ("random", "At random", "drawn from all labelled images"),
)


def write_report(
    manifest: Manifest,
    *,
    source_options: StorageOptions | None = None,
    seed: int = 0,
    evaluation: Evaluation | None = None,
    policy: Policy | None = None,
    now: float | None = None,
) -> str:
    """Write ``report/index.html`` below the run's output.

    A source that cannot be reached leaves the gallery without pictures, and the page says why.

    Args:
        manifest: the run.
        source_options: how to reach the images.
        seed: for the random third of the gallery.
        evaluation: shown in a separate section where given.
        policy: the one that ``evaluation`` diagnoses; for pictures of what its labels miss.
        now: seconds since the epoch; None: this machine's clock.

    Returns:
        The page's URL.
    """
    found = scan(manifest, sample=_GALLERY, seed=seed)
    picks = found.gallery(_GALLERY)
    tiles, problem = _tiles(
        manifest, source_options, [p for group in picks.values() for p in group]
    )
    page = page_environment().get_template("report.html.j2")
    html = page.render(
        **_overview(manifest, found, time.time() if now is None else now),
        **_charts(manifest, found),
        **_pace(newest_pace(manifest)),
        **_gallery(manifest, picks, tiles, problem),
        **_trouble(manifest, found),
        evaluation=evaluation,
        evaluation_remarks=remarks(evaluation) if evaluation else [],
        **_diagnosis(manifest, source_options, evaluation, policy),
        review=review_section(manifest, source_options),
    )
    manifest.store.put(REPORT_KEY, html.encode("utf-8", "backslashreplace"))
    return f"{manifest.url}/{REPORT_KEY}"


def _diagnosis(
    manifest: Manifest,
    source_options: StorageOptions | None,
    evaluation: Evaluation | None,
    policy: Policy | None,
) -> dict[str, Any]:
    if evaluation is None or evaluation.diagnosis is None:
        return {"diagnosis": None, "diagnosis_facts": [], "misses": [], "misses_problem": None}
    found, shown, problem = evaluation.diagnosis, [], None
    if policy is not None:
        try:
            source = open_store(str(manifest.record.source["url"]), source_options)
            shown = worst_misses(manifest, source, found.worst, policy)
        except LabelfleetError as exc:
            problem = exc.message
    return {
        "diagnosis": found,
        "diagnosis_facts": diagnosis_facts(found),
        "misses": shown,
        "misses_problem": problem,
    }


def page_environment() -> jinja2.Environment:
    """Jinja2 as our pages use it: everything escaped, nothing undefined."""
    assets = Path(__file__).parents[1] / "assets"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "percent": lambda v: "–" if v is None else f"{100 * v:.1f}",
        "rate": lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.1f}",
        "duration": shown_duration,
        "moment": lambda at: datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "estimate": _estimate,
        "file_name": lambda path: path.rsplit("/", 1)[-1] or path,
    }
    return environment


def _estimate(estimate: Estimate, times: float = 1.0) -> str:
    if estimate.value is None:
        return "unknown"
    value, low, high = (times * v for v in (estimate.value, estimate.low, estimate.high))
    if times == 1.0 and vague(low, high):  # shares, in percent, are bounded
        return f"about {plain(value)} (too few answers for an interval)"
    return f"{plain(value)} [{plain(low)}, {plain(high)}]"


def _overview(manifest: Manifest, found: Scan, now: float) -> dict[str, Any]:
    run, record = manifest.record.identity, manifest.record
    unstated = run.licence.strip().lower() in ("", "unstated", "none", "unknown")
    model = record.inference.get("name") or record.inference.get("model") or "YOLO-NAS"
    size = (record.inference.get("preprocessing") or {}).get("size")
    identity = [
        ("model", f"{model}, sha256 {run.model_sha256}"),
        ("licence of the model", "unstated" if unstated else run.licence),
        ("input", "×".join(map(str, size)) + " pixels" if isinstance(size, list) else None),
        ("runtime", f"{run.runtime}, {run.precision}"),
        ("classes", f"{len(run.categories)}"),
        ("source", record.source.get("url")),
        ("output", manifest.url),
        ("run created", record.created_at),
        ("config", run.config_hash),
        ("labelfleet", run.code_version),
    ]
    return {
        "url": manifest.url,
        "run": {
            "name": run.name,
            "licence_unstated": unstated,
            "code_version": run.code_version,
        },
        "identity": [(name, value) for name, value in identity if value],
        "found": found,
        "shards": _shards(manifest),
        "left_out": list(manifest.left_out().items()),
        "shown_score": SHOWN_SCORE,
        "floor": record.inference.get("score_floor"),
        "written_at": now,
    }


def _shards(manifest: Manifest) -> dict[str, int]:
    live = set(Listing(manifest.store).live_ids())
    committed = live & manifest.committed()
    quarantined = (live & manifest.quarantined().keys()) - committed
    left = len(live) - len(committed) - len(quarantined)
    return {
        "listed": len(live),
        "committed": len(committed),
        "quarantined": len(quarantined),
        "left": left,
    }


def _charts(manifest: Manifest, found: Scan) -> dict[str, Any]:
    by_score = found.by_class_and_score.sum(axis=0)
    first_shown = round(SHOWN_SCORE * SCORE_BINS)
    step = 1 / SCORE_BINS
    score_chart = figures.columns(
        [float(n) for n in by_score],
        [f"{i * step:.1f}" if i % 2 == 0 else "" for i in range(SCORE_BINS)],
        says=f"{found.detections} boxes by score, in steps of {step}",
        x_title="score",
        tips=[f"{i * step:.2f}–{(i + 1) * step:.2f}: {n:,} boxes" for i, n in enumerate(by_score)],
        classes=["bar" if i >= first_shown else "bar faint" for i in range(SCORE_BINS)],
    )
    names = _bucket_names()
    boxes_chart = figures.columns(
        [float(n) for n in found.by_boxes],
        names,
        says=f"labelled images by number of boxes at {SHOWN_SCORE} or more",
        x_title="boxes",
        tips=[f"{name} boxes: {n:,} images" for name, n in zip(names, found.by_boxes, strict=True)],
    )
    return {"score_chart": score_chart, "boxes_chart": boxes_chart, **_class_bars(manifest, found)}


def _bucket_names() -> list[str]:
    ends = [b - 1 for b in BOX_BUCKETS[1:]]
    names = [str(a) if a == b else f"{a}–{b}" for a, b in zip(BOX_BUCKETS, ends, strict=False)]
    return [*names, f"{BOX_BUCKETS[-1]}+"]


@dataclass(frozen=True, slots=True)
class _ClassBar:
    """One class: its boxes, and the widths of its bar and of the bands in it, in percent."""

    name: str
    total: int
    shown: int
    width: str
    shares: tuple[str, ...]


def _class_bars(manifest: Manifest, found: Scan) -> dict[str, Any]:
    edges = [round(b * SCORE_BINS) for b in BANDS]
    bands = np.add.reduceat(found.by_class_and_score, edges[:-1], axis=1)
    totals = bands.sum(axis=1)
    shown = bands[:, 1:].sum(axis=1)
    largest = max(1, int(totals.max(initial=0)))
    order = sorted(np.flatnonzero(totals), key=lambda k: (-shown[k], -totals[k], k))
    if len(totals) <= _MAX_CLASSES:  # few classes: also show those never found
        order += [k for k in range(len(totals)) if not totals[k]]
    names = [c.name for c in manifest.record.identity.categories]
    bars = [
        _ClassBar(
            name=names[k],
            total=int(totals[k]),
            shown=int(shown[k]),
            width=f"{100 * totals[k] / largest:.2f}",
            shares=tuple(f"{100 * n / max(1, totals[k]):.2f}" if n else "" for n in bands[k]),
        )
        for k in order
    ]
    return {
        "classes": bars[:_MAX_CLASSES],
        "classes_left": max(0, len(bars) - _MAX_CLASSES),
        "bands": [f"{a:.2f}–{b:.2f}" for a, b in pairwise(BANDS)],
    }


def _pace(pace: Pace | None) -> dict[str, Any]:
    if pace is None:
        return {"pace": None, "pace_chart": Markup(""), "stages": []}
    chart = figures.area(
        pace.edges_s.tolist(),
        pace.images_per_s.tolist(),
        says=f"images a second over the run; {pace.mean_images_per_s:.1f} on average",
        x_title="since the start",
        mean=pace.mean_images_per_s,
    )
    total = sum(pace.stages.values())
    stages = [
        {"name": name, "seconds": s, "percent": round(100 * s / total, 2), "color": color_of(i)}
        for i, (name, s) in enumerate(pace.stages.items())
    ]
    return {"pace": pace, "pace_chart": chart, "stages": stages}


def _tiles(
    manifest: Manifest, options: StorageOptions | None, picks: list[Pick]
) -> tuple[dict[str, Tile], str | None]:
    try:
        source = open_store(manifest.record.source["url"], options)
        tiles = draw_tiles(manifest, source, picks)
    except LabelfleetError as exc:
        return {}, exc.message
    problems = [t.problem for t in tiles.values()]
    if problems and all(problems):
        return {}, f"none of the images could be read again, such as: {problems[0]}"
    return tiles, None


def _gallery(
    manifest: Manifest, picks: dict[str, list[Pick]], tiles: dict[str, Tile], problem: str | None
) -> dict[str, Any]:
    groups = [
        {
            "name": name,
            "title": title,
            "explained": explained,
            "tiles": [tiles[p.row.image_id] for p in picks[name] if p.row.image_id in tiles],
        }
        for name, title, explained in _GROUPS
    ]
    names = [c.name for c in manifest.record.identity.categories]
    classes = {
        int(k)
        for t in tiles.values()
        for k in t.pick.row.detections.category_ids[t.pick.row.detections.scores >= SHOWN_SCORE]
    }
    return {"groups": groups, "gallery_problem": problem, "legend": legend(classes, names)}


def _trouble(manifest: Manifest, found: Scan) -> dict[str, Any]:
    aside = manifest.quarantined()
    committed = manifest.committed()
    quarantine = [aside[shard_id] for shard_id in sorted(aside.keys() - committed)]
    kinds = found.kinds()
    return {
        "quarantine": quarantine[:_MAX_SHOWN],
        "quarantine_left": max(0, len(quarantine) - _MAX_SHOWN),
        "kinds": kinds[:_MAX_SHOWN],
        "kinds_left": max(0, len(kinds) - _MAX_SHOWN),
        "failed_left": found.not_ok - len(found.failed),
    }

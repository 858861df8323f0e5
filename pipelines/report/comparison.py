"""The page of `compare`: counts, the drift test, and pictures of the largest changes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.console import unbroken
from pipelines.evaluation.compare import CHANGES, Comparison
from pipelines.report import figures
from pipelines.report.gallery import Tile, draw_tiles
from pipelines.report.page import page_environment
from pipelines.report.scan import Pick
from storage.errors import LabelfleetError
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow
from storage.runs.manifest import Manifest
from storage.stores.open import open_store

COMPARISON_KEY = "report/compare.html"
COMPARISON_JSON_KEY = "report/compare.json"


@dataclass(frozen=True, slots=True)
class _Pair:
    """One image as both runs see it."""

    name: str
    changes: int
    old: Tile
    new: Tile


def write_comparison(
    found: Comparison, old: Manifest, new: Manifest, options: StorageOptions | None = None
) -> str:
    """Write ``report/compare.html`` and ``.json`` below the new run's output.

    A source that cannot be reached leaves the page without pictures, and it says why.

    Returns:
        The page's URL.
    """
    pairs, problem = _pairs(found, old, new, options)
    html = page_environment().get_template("compare.html.j2").render(
        c=found,
        changes=CHANGES,
        total=found.changes.total(),
        score_charts=[_score_chart(found, at) for at in (0, 1)],
        pairs=pairs,
        problem=problem,
    )  # fmt: skip
    new.store.put(COMPARISON_KEY, html.encode("utf-8", "backslashreplace"))
    new.store.put(COMPARISON_JSON_KEY, json.dumps(found.to_fields(), indent=2).encode() + b"\n")
    return f"{new.url}/{COMPARISON_KEY}"


def _score_chart(found: Comparison, at: int) -> Markup:
    counts = found.scores[at]
    step = 1 / len(counts)
    return figures.columns(
        [float(n) for n in counts],
        [f"{i * step:.1f}" if i % 2 == 0 else "" for i in range(len(counts))],
        says=f"{sum(counts)} boxes by score, {'new run' if at else 'old run'}",
        x_title="score",
        tips=[f"{i * step:.2f}–{(i + 1) * step:.2f}: {n:,} boxes" for i, n in enumerate(counts)],
        classes=["bar"] * len(counts),
    )


def _pairs(
    found: Comparison, old: Manifest, new: Manifest, options: StorageOptions | None
) -> tuple[list[_Pair], str | None]:
    largest = found.changes.largest
    try:
        before = _tiles(old, [c.old for c in largest], options)
        after = _tiles(new, [c.new for c in largest], options)
    except LabelfleetError as exc:
        return [], exc.message
    pairs = [
        _Pair(
            c.new.image_id, int(c.changes), before[c.old.image_id], after[c.new.image_id]
        )
        for c in largest
    ]  # fmt: skip
    return pairs, None


def _tiles(
    run: Manifest, rows: list[AnnotationRow], options: StorageOptions | None
) -> dict[str, Tile]:
    source = open_store(str(run.record.source["url"]), options)
    return draw_tiles(run, source, [Pick(row, None) for row in rows])


def comparison_table(found: Comparison, page: str) -> RenderableType:
    """Return the comparison for people."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for change in CHANGES:
        table.add_column(change.replace("_", " "), justify="right")
    changes = found.changes
    lines = [*changes.by_class.items(), *changes.by_size.items(), ("all", changes.total())]
    for name, counts in lines:
        table.add_row(Text(name), *(f"{counts[change]:,}" for change in CHANGES))
    parts: list[RenderableType] = []
    if changes.images:
        parts += [Text(f"boxes on the {changes.images:,} images that both runs have"), table]
    parts.append(Text(found.drift.sentence, style="bold red" if found.drift.alarm else ""))
    if found.map_ is not None:
        before, after = ("unknown" if m is None else f"{m:.3f}" for m in found.map_)
        parts.append(Text(f"mAP {before} → {after}"))
    return Group(*parts, unbroken(f"page: {page}"))

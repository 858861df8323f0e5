"""What an evaluation found: the figures, their JSON, and how they are shown to people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class ClassResult:
    """One class. Figures are in [0, 1], or None where the ground truth has no box of it.

    Attributes:
        name: as the ground truth writes it.
        official_id: the ground truth's id.
        ap, ap50, ap75, ar: at IoU .50:.95, .50, .75; recall at IoU .50:.95 and 100 boxes.
        truth: boxes in the ground truth that count.
        detections: boxes in the evaluated rows, down to the run's score floor.
    """

    name: str
    official_id: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    ar: float | None
    truth: int
    detections: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A run against ground truth. Figures are in [0, 1], or None where nothing is to be found.

    Attributes:
        run, truth: URLs.
        map_, map50, map75, ar: means over the shared classes.
        ap_small, ap_medium, ap_large: by the area of the truth box (32², 96² pixels).
        classes: the shared classes, in the ground truth's order.
        images: evaluated.
        statuses: those images by row status.
        missing: names in the ground truth without a row (only where that was allowed).
        rows_without_truth: live rows that were left out.
        ignored: boxes that count neither way: crowds, `ignore`, DontCare classes.
        outside: detections left out because they lie outside their image altogether.
        without_area: boxes of the ground truth left out, without width or height.
        size_differs: images whose size is not the one the ground truth states, up to five names.
        n_size_differs: how many there are.
        unknown_to_run: class names only in the ground truth.
        unknown_to_truth: class names only in the run.
    """

    run: str
    truth: str
    map_: float | None
    map50: float | None
    map75: float | None
    ar: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    classes: tuple[ClassResult, ...]
    images: int
    statuses: dict[str, int]
    missing: int
    rows_without_truth: int
    ignored: int
    outside: int
    without_area: int
    size_differs: tuple[str, ...]
    n_size_differs: int
    unknown_to_run: tuple[str, ...]
    unknown_to_truth: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, under COCO's customary names (mAP, mAP50, AR, …)."""
        plain = asdict(self)
        for field, name in _JSON_NAMES.items():
            plain[name] = plain.pop(field)
        for one in plain["classes"]:
            for field in ("ap", "ap50", "ap75", "ar"):
                one[field.upper()] = one.pop(field)
        return plain


_JSON_NAMES = {
    "map_": "mAP", "map50": "mAP50", "map75": "mAP75", "ar": "AR",
    "ap_small": "AP_small", "ap_medium": "AP_medium", "ap_large": "AP_large",
}  # fmt: skip


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """The evaluation as a table for people, with what they should know below it."""
    table = Table(title=f"{evaluation.images:,} images", title_justify="left")
    for heading in ("class", "AP", "AP50", "AP75", "AR", "truth", "detections"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for c in evaluation.classes:
        figures = (_percent(v) for v in (c.ap, c.ap50, c.ap75, c.ar))
        table.add_row(escape(c.name), *figures, f"{c.truth:,}", f"{c.detections:,}")
    table.add_section()
    e = evaluation
    figures = (_percent(v) for v in (e.map_, e.map50, e.map75, e.ar))
    totals = (sum(c.truth for c in e.classes), sum(c.detections for c in e.classes))
    table.add_row("all", *figures, *(f"{n:,}" for n in totals), style="bold")
    return Group(table, *(Text(line) for line in remarks(evaluation)))


def remarks(e: Evaluation) -> list[str]:
    """What a reader of the figures has to know, a sentence each; empty when there is nothing."""
    bad = {s: n for s, n in e.statuses.items() if s != "ok"}
    said = [
        (sum(bad.values()), f"counted as empty, since their status is not ok: {_listed(bad)}"),
        (e.missing, f"left out, images of the ground truth without a row: {e.missing:,}"),
        (e.rows_without_truth, f"left out, rows without ground truth: {e.rows_without_truth:,}"),
        (e.ignored, f"counted neither way, crowds and ignore regions: {e.ignored:,}"),
        (e.outside, f"left out, detections that lie outside their image: {e.outside:,}"),
        (
            e.without_area,
            f"left out, boxes of the ground truth without area: {e.without_area:,}",
        ),
        (
            e.n_size_differs,
            f"not the size that the ground truth states: {e.n_size_differs:,} images, such as "
            f"{', '.join(e.size_differs)}; boxes may not fit (turned by EXIF? rescaled?)",
        ),
        (len(e.unknown_to_run), f"left out, classes the run lacks: {', '.join(e.unknown_to_run)}"),
        (
            len(e.unknown_to_truth),
            f"left out, classes the ground truth lacks: {', '.join(e.unknown_to_truth)}",
        ),
    ]
    return [what for n, what in said if n]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

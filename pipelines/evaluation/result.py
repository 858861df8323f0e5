"""The result of an evaluation: its figures, their JSON, and the table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipelines.display.plural import counted
from pipelines.evaluation.diagnosis import Diagnosis

_MOST_CLASSES = 12  # in a confusion matrix on a terminal


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
        ap_small, ap_medium, ap_large, ar_small, ar_medium, ar_large: by the area of the truth box
            (32², 96² pixels).
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
        diagnosis: what the labels of a policy get wrong; None: not asked for.
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
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
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
    diagnosis: Diagnosis | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return plain values, under COCO's customary names (mAP, mAP50, AR, …)."""
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
    "ar_small": "AR_small", "ar_medium": "AR_medium", "ar_large": "AR_large",
}  # fmt: skip


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """Return the evaluation as a table for people, with what they should know below it."""
    table = Table(title=counted(evaluation.images, "image"), title_justify="left")
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
    sizes = Table(title="by size of the object", title_justify="left")
    for heading in ("", "small", "medium", "large"):
        sizes.add_column(heading, justify="right" if heading else "left")
    sizes.add_row("AP", *(_percent(v) for v in (e.ap_small, e.ap_medium, e.ap_large)))
    sizes.add_row("AR", *(_percent(v) for v in (e.ar_small, e.ar_medium, e.ar_large)))
    parts: list[RenderableType] = [table, sizes]
    if e.diagnosis is not None:
        parts += _diagnosis_tables(e.diagnosis)
    return Group(*parts, *(Text(line) for line in remarks(evaluation)))


def diagnosis_facts(d: Diagnosis) -> list[tuple[str, str]]:
    """Return the diagnosis as names and values for people, without the confusion matrix."""
    return [
        (f"precision of {d.accepted:,} labels, percent", _percent(d.precision)),
        (f"recall of {d.objects:,} objects, percent", _percent(d.recall)),
        *((f"errors: {name.replace('_', ' ')}", f"{n:,}") for name, n in d.errors.items()),
        ("calibration error (D-ECE) of scores, percent", _percent(d.raw.d_ece)),
        ("calibration error (D-ECE) by the policy, percent", _percent(d.calibrated.d_ece)),
        ("with localisation (LaECE) of scores, percent", _percent(d.raw.la_ece)),
        ("with localisation (LaECE) by the policy, percent", _percent(d.calibrated.la_ece)),
    ]


def _diagnosis_tables(d: Diagnosis) -> list[RenderableType]:
    facts = Table(title=f"labels by policy {d.policy}", title_justify="left", show_header=False)
    for name, value in diagnosis_facts(d):
        facts.add_row(name, value)
    if len(d.classes) > _MOST_CLASSES:
        return [facts, Text(f"{len(d.classes)} classes: --json has the confusion matrix")]
    confusion = Table(title="objects by the class of the label on them", title_justify="left")
    for heading in ("true", *d.classes, "missed"):
        confusion.add_column(escape(heading), justify="left" if heading == "true" else "right")
    for name, row in zip((*d.classes, "nothing there"), d.confusion, strict=True):
        confusion.add_row(escape(name), *(f"{n:,}" for n in row))
    return [facts, confusion]


def remarks(e: Evaluation) -> list[str]:
    """List what a reader of the figures has to know, one sentence each."""
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

"""Display what ``labelfleet fit`` found."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from pipelines.display.console import unbroken
from pipelines.display.plural import counted
from pipelines.display.tables import figures_table
from pipelines.policy.fit import Fit
from pipelines.policy.guarantee import ClassProof, Guaranteed

_HEADINGS = (
    "boxes", "right", "accept\nfrom", "reject\nbelow", "accepted", "precision,\n%", "recall,\n%",
)  # fmt: skip


def fit_table(found: Fit, written: str | None, proven: Guaranteed | None = None) -> RenderableType:
    """Render thresholds by class, what to expect of them, and where the policy is stored.

    Args:
        written: None: the policy was refused, and not written.
        proven: the guarantee that was asked for; what it showed is accepted in place of the fit's.
    """
    title = f"{counted(found.images, 'image')}, by {escape(found.source)}"
    shown = proven is not None and proven.guarantee is not None
    if proven is not None:
        title = f"1. fit of {title}" + (": `accept from` does not count, see 2" * shown)
    table = figures_table(title, "class", _HEADINGS)
    for c in found.classes:
        limits = (f"{c.accept:.3f}", f"{c.reject:.3f}")
        figures = (f"{c.accepted:,}", _figure(c.precision), _figure(c.recall))
        name = escape(c.name) + " *" * c.leans
        table.add_row(name, f"{c.boxes:,}", f"{c.right:,}", *limits, *figures)
    table.add_section()
    right = sum(c.right for c in found.classes)
    accepted = sum(c.accepted for c in found.classes)
    figures = (f"{accepted:,}", _figure(found.precision), _figure(found.recall))
    table.add_row("all", f"{found.boxes:,}", f"{right:,}", "", "", *figures, style="bold")
    lines = [
        "thresholds are probabilities; accepted, precision and recall are cross-validated",
        f"calibration error: {found.error_before:.3f} of raw scores, {found.error_after:.3f} after",
    ]
    place = "policy: not written" if written is None else f"policy: {written}"
    if found.ignored_area is not None:
        share = f"between the thresholds lies {_percent(found.ignored_area)} of the image area"
        lines.insert(2, f"{share}: neither label nor background")
    if any(c.leans for c in found.classes):
        lines.insert(0, "* few boxes: leans on the curve of all classes")
    warnings = (Text(f"note: {warning}", style="yellow") for warning in found.warnings)
    below = () if proven is None else (Text(), _guarantee_table(proven, written))
    return Group(
        table, *map(Text, lines), unbroken(place), *warnings, *_refusal(found, written), *below
    )


def _refusal(found: Fit, written: str | None) -> list[Text]:
    """What is said of a policy that must not be used."""
    if found.refused is None:
        return []
    if written is not None:
        return [Text(f"warning: written although {found.refused}", style="red")]
    lines = (
        f"refused: {found.refused}",
        "the policy in use stays: that of an earlier fit or routing, else the built-in one",
        "audit more images, ask for a lower --precision, or write it anyway with --force",
    )
    return [Text(line, style="red") for line in lines]


def _guarantee_table(found: Guaranteed, written: str | None) -> RenderableType:
    """Render from which raw scores the share asked for was shown, the statement, and what
    `decide` makes of it."""
    headings = ("holds from\nraw score", "boxes accepted", "audited boxes right")
    table = figures_table("2. guarantee", "class", headings)
    for proof in (*found.classes, found.all):
        held = "not shown" if proof.threshold is None else f"{proof.threshold:g}"
        table.add_row(escape(proof.name), held, f"{proof.accepted:,}", _percent(proof.right))
    said = "Nothing is guaranteed." if found.guarantee is None else found.guarantee.sentence
    more = [_more(proof) for proof in (*found.classes, found.all) if proof.threshold is None]
    lines = (Text(line, style="yellow") for line in more)
    return Group(table, Text(said), Text(_what_counts(found, written)), *lines)


def _what_counts(found: Guaranteed, written: str | None) -> str:
    """Say which table the policy follows."""
    if written is None:
        return "Neither table counts: no policy was written."
    if found.guarantee is None:
        return "What counts is table 1: no threshold of table 2 was written."
    row = "its row `all`" if found.guarantee.by == "all" else "the rows of the classes"
    return (
        f"What counts is table 2: `decide` accepts boxes from {row} on, and nothing of a class "
        "that is not shown; of table 1 only `reject below` stays."
    )


def _more(proof: ClassProof) -> str:
    if proof.more is None:
        why = "the boxes are not right often enough"
        return f"{proof.name}: more audit images alone would not show it: {why}"
    return f"{proof.name}: about {proof.more:,} more audit images would do"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

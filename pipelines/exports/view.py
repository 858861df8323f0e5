"""An export, shown."""

from __future__ import annotations

from rich.console import RenderableType

from pipelines.display.tables import summary_table
from pipelines.exports.export import ExportSummary


def export_table(summary: ExportSummary) -> RenderableType:
    """Show what an export wrote. Counts of zero and what does not apply are left out."""
    rows = [("images", f"{summary.images:,}"), ("labels", f"{summary.labels:,}")]
    counts = (
        ("images without a label", summary.empty),
        ("ignore boxes", summary.ignored),
        ("turned upright", summary.turned_upright),
        ("copied by an earlier attempt", summary.copied_before),
        ("images left out", summary.left_out),
    )
    rows += [(name, f"{count:,}") for name, count in counts if count]
    if summary.first_problem is not None:
        rows.append(("first problem", summary.first_problem))
    rows.append(("written to", summary.dest))
    return summary_table(f"{summary.format} of labels {summary.version}", rows)

"""A run's summary, rendered for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.plural import counted
from pipelines.labelling.summary import RunSummary
from storage.shards.selecting import shown_counts

_STATUSES = ("ok", "undecodable", "too_large", "unsupported", "missing")


def run_table(summary: RunSummary) -> RenderableType:
    """Render the final table, and below it what needs attention."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("images", f"{summary.images:,}")
    for status in _STATUSES:
        count: int = getattr(summary, status)
        if status == "ok" or count:
            table.add_row(f"  {status}", f"{count:,}", style=None if status == "ok" else "yellow")
    table.add_row("detections", f"{summary.detections:,}")
    table.add_row("shards committed", f"{summary.shards:,}")
    if summary.left:
        table.add_row("shards left", f"{summary.left:,}")
    if summary.quarantined:
        table.add_row("shards quarantined", f"{summary.quarantined:,}", style="red")
    if summary.new_images:
        table.add_row(
            "this time", f"{counted(summary.new_images, 'image')} in {summary.seconds:.1f} s"
        )
        table.add_row("", f"{summary.startup_s:.1f} s of them start-up")
        table.add_row("", f"then {summary.images_per_s:.1f} images/s")
    elif summary.outcome == "done" and not summary.left:
        table.add_row("this time", f"nothing to do ({summary.seconds:.1f} s)")
    else:
        table.add_row("this time", f"no images in {summary.seconds:.1f} s")
    return Group(Text(summary.output, "bold"), table, *_remarks(summary))


def _remarks(summary: RunSummary) -> list[Text]:
    remarks = [Text(f"truncated: {said}", style="yellow") for said in summary.truncated[:10]]
    if summary.quarantined:
        remarks.append(
            Text(
                f"{counted(summary.quarantined, 'shard')} failed every attempt; the reasons are "
                f"below {summary.output}/quarantine/. The next run tries each once more.",
                style="red",
            )
        )
    if summary.drift:
        remarks.append(Text(f"Drift: later images {summary.drift}", style="yellow"))
    if summary.left_out:
        remarks.append(Text(f"left out of the source: {shown_counts(summary.left_out)}"))
    if summary.outcome == "stopped":
        remarks.append(Text("Stopped with work left; run the same command to continue."))
    if summary.routed:
        remarks.append(
            Text(
                f"routed: {counted(summary.routed, 'image')}; next: labelfleet review push "
                f"{summary.output}"
            )
        )
    return remarks

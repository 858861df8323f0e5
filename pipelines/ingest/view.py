"""Display an ingest: a bar while it runs, a table at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.console import unbroken
from pipelines.display.plural import counted
from pipelines.display.progress_bar import progress_bar
from pipelines.ingest.ingest import IngestProgress, IngestSummary
from pipelines.ingest.ingest import Progress as Tell
from storage.shards.selecting import shown_counts


@contextmanager
def ingest_progress() -> Iterator[Tell]:
    """Yield a function that takes progress."""
    with progress_bar("ingesting", "images") as bar:
        yield lambda now: bar.update(now.entries, now.total, _said(now))


def _said(now: IngestProgress) -> str:
    said = counted(now.shards, "shard")
    return f"{said}, {counted(now.errors, 'error')}" if now.errors else said


def ingest_table(summary: IngestSummary) -> RenderableType:
    """Render the result for people."""
    table = Table(title="Ingested", title_justify="left", show_header=False)
    table.add_row("images", f"{summary.images:,}")
    kept = f" ({summary.kept:,} were there)" if summary.kept else ""
    table.add_row("shards", f"{summary.shards:,}{kept}")
    table.add_row("MiB", f"{summary.nbytes / 2**20:,.1f}")
    table.add_row("seconds", f"{summary.seconds:.1f}")
    remarks = [Text(said, style="yellow") for said in summary.remarks]
    if summary.left_out:
        remarks.append(Text(f"left out, not named like images: {shown_counts(summary.left_out)}"))
    remarks.append(unbroken(f"shards: {summary.output}"))
    if summary.errors_url is not None:
        told = f"{summary.errors:,} could not be read, see {summary.errors_url}"
        remarks.insert(0, Text(told, style="yellow"))
    return Group(table, *remarks)

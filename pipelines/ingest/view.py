"""What people see of an ingest: a bar while it goes, a table at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pipelines.display.console import HarmlessConsole
from pipelines.ingest.ingest import IngestProgress, IngestSummary
from pipelines.ingest.ingest import Progress as Tell

_LINE_EVERY_S = 10.0


@contextmanager
def ingest_progress() -> Iterator[Tell]:
    """A function to tell progress to: a bar on a terminal's stderr, else a line now and then."""
    console = HarmlessConsole(stderr=True)
    if not sys.stderr.isatty():
        yield _lines(console)
        return
    columns = (
        TextColumn("ingesting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, said="")
        yield lambda now: bar.update(task, completed=now.entries, total=now.total, said=_said(now))


def _lines(console: Console) -> Tell:
    last_s = time.monotonic()

    def tell(now: IngestProgress) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _LINE_EVERY_S:
            last_s = time.monotonic()
            console.print(f"{now.entries}/{now.total} images, {_said(now)}", markup=False)

    return tell


def _said(now: IngestProgress) -> str:
    said = f"{now.shards} shards"
    return f"{said}, {now.errors} errors" if now.errors else said


def ingest_table(summary: IngestSummary) -> RenderableType:
    """For people."""
    table = Table(title="Ingested", title_justify="left", show_header=False)
    table.add_row("images", f"{summary.images:,}")
    kept = f" ({summary.kept:,} were there)" if summary.kept else ""
    table.add_row("shards", f"{summary.shards:,}{kept}")
    table.add_row("MiB", f"{summary.nbytes / 2**20:,.1f}")
    table.add_row("seconds", f"{summary.seconds:.1f}")
    remarks = [Text(said, style="yellow") for said in summary.remarks]
    remarks.append(Text(f"shards: {summary.output}"))
    if summary.errors_url is not None:
        told = f"{summary.errors:,} could not be read, see {summary.errors_url}"
        remarks.insert(0, Text(told, style="yellow"))
    return Group(table, *remarks)

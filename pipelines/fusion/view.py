"""Display a fusion: a bar while it runs, its result at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.table import Table
from rich.text import Text

from pipelines.display.progress_bar import progress_bar
from pipelines.fusion.fuse import FuseSummary


@contextmanager
def fuse_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes (shards done, of how many)."""
    with progress_bar("fusing", "shards") as bar:
        yield bar.update


def fuse_table(done: FuseSummary) -> Table:
    """Render the result for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("run", Text(f"{done.name} at {done.url}"))
    table.add_row("fused", Text(", ".join(done.runs)))
    shards = f"{done.committed:,} fused, {done.before:,} before"
    if done.waiting:
        shards += f", {done.waiting:,} wait until every run has labelled them: fuse again then"
    table.add_row("shards", shards)
    table.add_row("images", f"{done.images:,} with {done.detections:,} boxes")
    for name, count in done.alone.items():
        table.add_row("", Text(f"{count:,} of them are not in {name}: the others vote alone"))
    for remark in done.remarks[1:]:
        table.add_row("note", Text(remark))
    return table

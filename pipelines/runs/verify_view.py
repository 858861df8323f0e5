"""Display a verification: a bar while it runs, the differences at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipelines.display.plural import counted
from pipelines.display.progress_bar import progress_bar
from pipelines.runs.verification import Verification

_SHOWN = 30

Tell = Callable[[int, int], None]


@contextmanager
def verify_progress() -> Iterator[Tell]:
    """Yield a function that takes (shards done, of how many)."""
    with progress_bar("verifying", "shards") as bar:
        yield bar.update


def verify_table(found: Verification) -> RenderableType:
    """Render the result for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("run", Text(f"{found.name} at {found.url}"))
    table.add_row("shards", Text(_shards(found)))
    how = "in footers of" if found.quick else "read from"
    rows, boxes = counted(found.images, "row"), counted(found.detections, "box", "boxes")
    read = f"{rows}, {boxes} {how} {decimal(found.nbytes)}"
    table.add_row("objects", Text(read))
    table.add_row("beside", Text(_beside(found)))
    if found.images_rehashed or found.tars_reread:
        images, tars = counted(found.images_rehashed, "image"), counted(found.tars_reread, "tar")
        reread = f"{images} hashed again, {tars} read"
        table.add_row("source", Text(reread))
    table.add_row("verdict", _verdict(found))
    parts: list[RenderableType] = [table]
    differences = [
        f"{d.key}: {d.what}" + (f" (shard {d.shard_id})" if _adds(d.shard_id, d.key) else "")
        for d in found.differences
    ]
    parts += _list("differences", differences, found.found, "red")
    orphans = [f"{o.key} ({decimal(o.nbytes)}): {o.why}" for o in found.orphans]
    parts += _list("orphans", orphans, len(orphans), "yellow")
    parts += _list("remarks", found.remarks, len(found.remarks), "dim")
    return Group(*parts)


def _adds(shard_id: str, key: str) -> bool:
    return bool(shard_id) and shard_id not in key


def _shards(found: Verification) -> str:
    parts = [f"{found.committed:,} of {found.listed:,} labelled"]
    if found.left:
        parts.append(f"{found.left:,} left")
    if found.quarantined:
        parts.append(f"{found.quarantined:,} quarantined")
    return ", ".join(parts)


def _beside(found: Verification) -> str:
    return (
        f"{found.label_versions:,} label versions, {found.queue_parts:,} queue parts, "
        f"{found.answer_parts:,} answer parts, {found.model_files:,} model files"
    )


def _verdict(found: Verification) -> Text:
    if found.clean:
        return Text("clean", "green")
    return Text(f"{found.found:,} differences", "bold red")


def _list(title: str, lines: list[str], total: int, style: str) -> Iterator[RenderableType]:
    if not lines:
        return
    yield Text(title, "bold")
    for line in lines[:_SHOWN]:
        yield Text(f"  {line}", style)
    if total > _SHOWN:
        yield Text(f"  … and {total - _SHOWN:,} more; --json has them", "dim")

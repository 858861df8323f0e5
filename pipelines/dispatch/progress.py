"""Progress of a run: a live bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from pipelines.dispatch.tally import Tally, Watcher
from pipelines.display.plural import counted
from pipelines.display.progress_bar import Pace, ProgressBar, progress_bar
from storage.logs import log_format

log = logging.getLogger("labelfleet")


class _Shown:
    """Progress for people."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self.note = bar.note

    def update(self, tally: Tally) -> None:
        self._bar.update(tally.shards + tally.quarantined, tally.total, _said(tally))


class _Logged:
    """Log lines with figures, for machines."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._pace = Pace(clock)

    def update(self, tally: Tally) -> None:
        if self._pace.due():
            figures = {
                "shards_done": tally.shards + tally.quarantined,
                "shards_total": tally.total,
                "images": tally.images,
                "images_per_s": round(tally.images_per_s, 1),
                "workers": tally.workers_alive,
            }
            log.info("progress", extra=figures)

    def note(self, text: str) -> None:
        log.warning("%s", text)


def _said(tally: Tally) -> str:
    if tally.workers_alive == 0 and tally.images == 0:
        return "starting workers"
    parts = [
        counted(tally.images, "image"),
        f"{tally.images_per_s:.1f}/s",
        counted(tally.workers_alive, "actor"),
    ]
    bad = tally.images - tally.counts.get("ok", 0)
    if bad:
        parts.append(f"{bad} not ok")
    if tally.errors or tally.workers_lost:
        errors, lost = counted(tally.errors, "error"), counted(tally.workers_lost, "worker")
        parts.append(f"{errors}, {lost} lost")
    if tally.quarantined:
        parts.append(f"{tally.quarantined} quarantined")
    return ", ".join(parts)


@contextmanager
def watching(
    *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Watcher]:
    """Yield the command line's watcher.

    It shows a bar where the console is a terminal, a line every ten seconds elsewhere, and log
    lines where LABELFLEET_LOG asks for JSON.

    Args:
        console: None: stderr.
        clock: monotonic seconds, for the lines.
    """
    if log_format() == "json":
        yield _Logged(clock)
        return
    bar = progress_bar("labelling", "shards", console=console, clock=clock, transient=False)
    with bar as shown:
        yield _Shown(shown)

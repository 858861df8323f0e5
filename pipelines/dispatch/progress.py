"""Progress of a run: a live bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipelines.dispatch.tally import Tally, Watcher
from pipelines.display.console import HarmlessConsole
from storage.logs import log_format

_LINE_EVERY_S = 10.0

log = logging.getLogger("labelfleet")


class _Bar:
    """Shown from the first figures on: what comes before has nothing to measure."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("labelling", total=None, said="starting workers")

    def update(self, tally: Tally) -> None:
        self._progress.start()
        done = tally.shards + tally.quarantined
        self._progress.update(self._task, total=tally.total, completed=done, said=_said(tally))

    def note(self, text: str) -> None:
        self._progress.console.print(Text(text, "yellow"))


class _Lines:
    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._last_s = clock()

    def update(self, tally: Tally) -> None:
        now_s = self._clock()
        if now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            done = tally.shards + tally.quarantined
            self.note(f"{done}/{tally.total} shards, {_said(tally)}")

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class _Logged:
    """Log lines with figures, for machines."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s = clock()

    def update(self, tally: Tally) -> None:
        now_s = self._clock()
        if now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
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
        f"{tally.images} images",
        f"{tally.images_per_s:.1f}/s",
        f"{tally.workers_alive} actors",
    ]
    bad = tally.images - tally.counts.get("ok", 0)
    if bad:
        parts.append(f"{bad} not ok")
    if tally.errors or tally.workers_lost:
        parts.append(f"{tally.errors} errors, {tally.workers_lost} workers lost")
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
    # Not rich's own test, which FORCE_COLOR overrides: a bar makes a mess of a log.
    live = sys.stderr.isatty() if console is None else console.is_terminal
    console = console or HarmlessConsole(stderr=True)
    if not live:
        yield _Lines(console, clock)
        return
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        yield _Bar(progress)
    finally:
        if progress.live.is_started:
            progress.stop()

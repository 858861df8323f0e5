"""What people see while a run is going: a live bar on a terminal, a line now and then elsewhere."""

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
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("labelling", total=total, said="starting workers")
        self._began_s = time.monotonic()

    def update(self, tally: Tally) -> None:
        rate = tally.images / max(1e-6, time.monotonic() - self._began_s)
        self._progress.update(
            self._task, completed=tally.shards + tally.quarantined, said=_said(tally, rate)
        )

    def note(self, text: str) -> None:
        self._progress.console.print(Text(text, "yellow"))


class _Lines:
    def __init__(self, console: Console, total: int, clock: Callable[[], float]) -> None:
        self._console, self._total, self._clock = console, total, clock
        self._began_s = self._last_s = clock()

    def update(self, tally: Tally) -> None:
        now_s = self._clock()
        if now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            rate = tally.images / max(1e-6, now_s - self._began_s)
            done = tally.shards + tally.quarantined
            self.note(f"{done}/{self._total} shards, {_said(tally, rate)}")

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class _Logged:
    """For machines: log lines with figures, in place of a display."""

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self._total, self._clock = total, clock
        self._began_s = self._last_s = clock()

    def update(self, tally: Tally) -> None:
        now_s = self._clock()
        if now_s - self._last_s >= _LINE_EVERY_S:
            self._last_s = now_s
            figures = {
                "shards_done": tally.shards + tally.quarantined,
                "shards_total": self._total,
                "images": tally.images,
                "images_per_s": round(tally.images / max(1e-6, now_s - self._began_s), 1),
                "workers": tally.workers_alive,
            }
            log.info("progress", extra=figures)

    def note(self, text: str) -> None:
        log.warning("%s", text)


def _said(tally: Tally, rate: float) -> str:
    if tally.workers_alive == 0 and tally.images == 0:
        return "starting workers"
    parts = [f"{tally.images} images", f"{rate:.1f}/s", f"{tally.workers_alive} actors"]
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
    total_shards: int,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Watcher]:
    """A watcher: a bar where the console is a terminal, else a line every ten seconds; log lines
    where LABELFLEET_LOG asks for JSON.

    Args:
        total_shards: of this invocation.
        console: None: stderr.
        clock: monotonic seconds, for the lines.
    """
    if log_format() == "json":
        yield _Logged(total_shards, clock)
        return
    # Not rich's own test, which FORCE_COLOR overrides: a bar makes a mess of a log.
    live = sys.stderr.isatty() if console is None else console.is_terminal
    console = console or HarmlessConsole(stderr=True)
    if not live:
        yield _Lines(console, total_shards, clock)
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
    with progress:
        yield _Bar(progress, total_shards)

"""Progress of long commands: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipelines.display.console import HarmlessConsole

LINE_EVERY_S = 10.0


class ProgressBar(Protocol):
    """Receiver of progress."""

    def update(self, done: int, total: int | None, said: str = "") -> None:
        """``done`` of ``total`` (None: not known yet), and what else there is to say."""

    def note(self, text: str) -> None:
        """Show a note above the bar."""


@dataclass(slots=True)
class Pace:
    """Decide when the next line is due: every ten seconds, the first after ten.

    Attributes:
        clock: monotonic seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _last_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._last_s = self.clock()

    def due(self) -> bool:
        """Return whether ten seconds have passed since the last True."""
        now_s = self.clock()
        if now_s - self._last_s < LINE_EVERY_S:
            return False
        self._last_s = now_s
        return True


class _Bar:
    """Show figures from the first ones on; there is nothing to measure before."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, total: int | None, said: str = "") -> None:
        self._progress.start()
        self._progress.update(self._task, completed=done, total=total, said=said)

    def note(self, text: str) -> None:
        self._progress.console.print(Text(text, "yellow"))


class _Lines:
    def __init__(self, console: Console, unit: str, pace: Pace) -> None:
        self._console, self._unit, self._pace = console, unit, pace

    def update(self, done: int, total: int | None, said: str = "") -> None:
        if self._pace.due():
            of = "?" if total is None else total
            self.note(f"{done}/{of} {self._unit}" + (f", {said}" if said else ""))

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


@contextmanager
def progress_bar(
    name: str,
    unit: str,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
    transient: bool = True,
) -> Iterator[ProgressBar]:
    """Yield a bar where the console is a terminal, elsewhere a line every ten seconds.

    Args:
        name: of the activity, shown left of the bar.
        unit: of what is counted, in the plural.
        console: None: stderr.
        clock: monotonic seconds, for the lines.
        transient: the bar disappears at the end.
    """
    # Not rich's own test, which FORCE_COLOR overrides: a bar makes a mess of a log.
    live = sys.stderr.isatty() if console is None else console.is_terminal
    console = console or HarmlessConsole(stderr=True)
    if not live:
        yield _Lines(console, unit, Pace(clock))
        return
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )
    try:
        yield _Bar(progress, progress.add_task(name, total=None, said=""))
    finally:
        if progress.live.is_started:
            progress.stop()

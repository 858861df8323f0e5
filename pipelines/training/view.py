"""Display a training: a progress line with loss and rate, one line per validation."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipelines.training.validation import Scores
from workers.training.trainer import StepReport

_LINE_EVERY_S = 60.0
_SMOOTHING = 0.95  # of the shown loss; single batches jump


class TrainView:
    """A context manager around a training. Without a console it shows nothing."""

    def __init__(
        self,
        console: Console | None,
        first: int,
        steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        columns = (
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # Not rich's own test alone, which FORCE_COLOR overrides: a bar makes a mess of a log.
        self._live = console is not None and console.is_terminal and console.file.isatty()
        self._progress = Progress(
            *columns,
            console=console or Console(quiet=True),
            disable=not self._live,
            # Steps before a stop were not made at this rate.
            speed_estimate_period=120,
        )
        self._console = console
        self._loss: float | None = None
        self._clock = clock
        self._said_at = clock()
        self._steps = steps
        self._task = self._progress.add_task("", total=steps, completed=first, rate="", loss="–")

    def __enter__(self) -> TrainView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, report: StepReport) -> None:
        """Show one step."""
        old = report.loss if self._loss is None else self._loss
        self._loss = _SMOOTHING * old + (1 - _SMOOTHING) * report.loss
        speed = next(iter(self._progress.tasks)).speed
        rate = "" if speed is None else f"{speed:.1f} steps/s"
        self._progress.update(
            self._task, completed=report.step, loss=f"{self._loss:.3f}", rate=rate
        )

        if self._console is not None and not self._live:
            self._line(report)

    def _line(self, report: StepReport) -> None:
        """A line a minute where no bar can be drawn."""
        if self._clock() - self._said_at < _LINE_EVERY_S:
            return
        self._said_at = self._clock()
        self._progress.console.print(
            f"step {report.step} of {self._steps}: loss {self._loss:.3f}", soft_wrap=True
        )

    def validated(self, step: int, scores: Scores) -> None:
        """Show one validation."""
        if self._console is not None:
            shown = "" if self._loss is None else f"loss {self._loss:.3f}  "
            self._progress.console.print(
                f"step {step}: {shown}val mAP {scores.map_:.3f}  mAP50 {scores.map50:.3f}  "
                f"mAP75 {scores.map75:.3f}"
            )

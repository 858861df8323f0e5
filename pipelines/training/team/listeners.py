"""Who hears of a training's steps and validations beside the display: TensorBoard, or your own.

``report: [tensorboard, my_package.tracking:Tracker]`` names them in the config. An entry of your
own is ``module:name`` of a callable that takes the config as a plain mapping and the output folder,
and returns a ``Listener``; MLflow or Weights & Biases take about ten lines, and are no dependency
of this package.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pipelines.training.validation import Scores
from storage.errors import ConfigError
from workers.training.trainer import StepReport

log = logging.getLogger("labelfleet")


class Listener(Protocol):
    """Hears of a training, in the process that leads it; an error of its own ends nothing.

    Steps count through all stages of a training, so that each has one number.
    """

    def step(self, report: StepReport) -> None:
        """One step is done."""

    def validated(self, step: int, scores: Scores) -> None:
        """The averaged weights were measured."""

    def close(self) -> None:
        """The process is about to leave the training, finished or not."""


_CURRENT: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listeners: Sequence[Listener]) -> Iterator[None]:
    """Let ``listeners`` hear of the trainings inside the block, then close them."""
    before = _CURRENT.set((*_CURRENT.get(), *listeners))
    try:
        yield
    finally:
        _CURRENT.reset(before)
        for listener in listeners:
            _guarded(listener.close)


def tell_step(report: StepReport) -> None:
    """Tell the listeners of this block about a step."""
    for listener in _CURRENT.get():
        _guarded(listener.step, report)


def tell_validated(step: int, scores: Scores) -> None:
    """Tell the listeners of this block about a validation."""
    for listener in _CURRENT.get():
        _guarded(listener.validated, step, scores)


def _guarded(call: Any, *words: Any) -> None:
    try:
        call(*words)
    except Exception:  # foreign code's border: a tracking server may be away for a while
        log.warning("a listener of the training failed", exc_info=True)


def listeners_of(names: Sequence[str], config: Mapping[str, Any], folder: Path) -> list[Listener]:
    """Return the listeners that the config names.

    Raises:
        ConfigError: one of them cannot be imported or made.
    """
    return [_made(name, config, folder) for name in names]


def _made(name: str, config: Mapping[str, Any], folder: Path) -> Listener:
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard")
    module, _, attribute = name.partition(":")
    try:
        listener: Listener = getattr(importlib.import_module(module), attribute)(config, folder)
    except Exception as exc:  # foreign code's border
        raise ConfigError(
            f"report: {name} cannot be used: {type(exc).__name__}: {exc}",
            hint="write `tensorboard`, or `module:name` of a callable that takes the config and "
            "the output folder",
        ) from exc
    return listener


class TensorBoard:
    """TensorBoard event files: loss and its parts, the rate, and the scores of validations."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter  # a second to import
        except ImportError as exc:
            raise ConfigError(
                "report: tensorboard needs the package tensorboard",
                hint="pip install tensorboard, or leave the entry out",
            ) from exc
        self._open = partial(SummaryWriter, str(folder))
        self._writer: Any = None

    def step(self, report: StepReport) -> None:
        """Write one step's figures."""
        if self._writer is None:
            # An earlier process may have written steps that its state did not keep.
            self._writer = self._open(purge_step=report.step)
        parts = dict(zip(("classification", "iou", "dfl"), report.parts, strict=True))
        for name, value in {"loss/all": report.loss, "lr": report.lr}.items():
            self._writer.add_scalar(name, value, report.step)
        for name, value in parts.items():
            self._writer.add_scalar(f"loss/{name}", value, report.step)

    def validated(self, step: int, scores: Scores) -> None:
        """Write one validation's scores."""
        if self._writer is None:
            self._writer = self._open()
        shown = {"mAP": scores.map_, "mAP50": scores.map50, "mAP75": scores.map75, "AR": scores.ar}
        for name, value in shown.items():
            self._writer.add_scalar(f"val/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

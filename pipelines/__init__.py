"""What runs, in which order; and, loaded on first use, what notebooks and other programs call."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.config.run_config import load_config
    from pipelines.face.run import Run
    from pipelines.face.steps import decide, export, fit
    from pipelines.labelling.run import label_run
    from pipelines.rounds.round import run_round
    from pipelines.rounds.round_config import load_round_config
    from pipelines.training.config import load_train_config
    from pipelines.training.run import train

__all__ = (
    "Run", "decide", "export", "fit", "label_run", "load_config", "load_round_config",
    "load_train_config", "run_round", "train",
)  # fmt: skip

_ADDRESSES = {
    "Run": "pipelines.face.run",
    "decide": "pipelines.face.steps",
    "export": "pipelines.face.steps",
    "fit": "pipelines.face.steps",
    "label_run": "pipelines.labelling.run",
    "load_config": "pipelines.config.run_config",
    "load_round_config": "pipelines.rounds.round_config",
    "run_round": "pipelines.rounds.round",
    "load_train_config": "pipelines.training.config",
    "train": "pipelines.training.run",
}


def __getattr__(name: str) -> Any:
    """Import a name of the face when it is first asked for (PEP 562)."""
    if name not in _ADDRESSES:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    return getattr(import_module(_ADDRESSES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

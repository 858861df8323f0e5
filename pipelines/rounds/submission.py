"""Tell a round's config from a training's and a run's, and what of it travels with a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.cluster.bundle import BundleKind
from pipelines.config.yaml_files import overridden_yaml, parse_config
from pipelines.rounds.round_config import ROUND_PAGE, RoundConfig
from pipelines.training.team import submission as of_training

_ROLES = ("train", "student")  # sections that hold fields of a training
_SETS = ("truth", "test", "val")


def kind_of(path: str, overrides: tuple[str, ...] = ()) -> BundleKind:
    """Return what the config is of: a round, which has a ``pool``, a training or a run.

    Raises:
        ConfigError: it cannot be read.
    """
    fields = overridden_yaml(path, overrides)
    return ROUND if {"pool", "truth"} <= fields.keys() else of_training.kind_of(fields)


def _parse(fields: dict[str, Any], where: str) -> RoundConfig:
    return parse_config(RoundConfig, fields, where=where, page=ROUND_PAGE)


def _of_roles(fields: Mapping[str, Any], *, folders: bool) -> Iterator[str]:
    """Yield the keys of a training's files or folders in each section that has such fields."""
    kind = of_training.TRAINING
    for role in _ROLES:
        section = fields.get(role)
        if isinstance(section, Mapping):
            keys = kind.folders(section) if folders else kind.files(section)
            yield from (f"{role}.{key}" for key in keys if key != "output")


def _reviews(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of earlier runs whose answers count."""
    review = fields.get("review")
    others = review.get("answers_from") if isinstance(review, Mapping) else None
    yield from (f"review.answers_from.{k}" for k in range(len(others or ())))


ROUND = BundleKind(
    command="round",
    parse=_parse,
    files=lambda fields: (
        "pool.keys",
        *(f"{name}.annotations" for name in _SETS),
        *("teacher.checkpoint", "teacher.arch", "policy", "run.model.arch", "review.gold_truth"),
        *_of_roles(fields, folders=False),
    ),
    folders=lambda fields: (
        *("pool.url", "output", "previous", "work"),
        *(f"{name}.images" for name in _SETS),
        *_of_roles(fields, folders=True),
        *_reviews(fields),
    ),
)

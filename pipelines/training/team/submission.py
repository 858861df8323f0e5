"""Tell a training's config from a run's, and what of it travels with a submitted job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.cluster.bundle import RUN, BundleKind
from pipelines.config.yaml_files import parse_config
from pipelines.training.config import TRAIN_PAGE, TrainConfig


def kind_of(fields: Mapping[str, Any]) -> BundleKind:
    """Return what a config is of: a training has ``train`` and ``val``, a run has neither."""
    return TRAINING if {"train", "val"} <= fields.keys() else RUN


def _parse(fields: dict[str, Any], where: str) -> TrainConfig:
    return parse_config(TrainConfig, fields, where=where, page=TRAIN_PAGE)


def _parts(fields: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the config and its stages, each with the start of its keys."""
    yield "", fields
    stages = fields.get("stages")
    for k, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, Mapping):
            yield f"stages.{k}.", stage


def _sets(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of all sets: ``train`` or ``train.0``, …, ``val`` and ``test.<name>``, and
    those of each stage."""
    for start, part in _parts(fields):
        train = part.get("train")
        many = [f".{k}" for k in range(len(train))] if isinstance(train, list) else [""]
        yield from (f"{start}train{one}" for one in many)
        yield f"{start}val"
    tests = fields.get("test")
    yield from (f"test.{name}" for name in (tests if isinstance(tests, Mapping) else ()))


TRAINING = BundleKind(
    command="train",
    parse=_parse,
    files=lambda fields: (
        *(f"{part}.annotations" for part in _sets(fields)),
        *("model.checkpoint", "model.arch"),
        *(f"{start}distill.teacher" for start, _ in _parts(fields)),
    ),
    folders=lambda fields: (
        *(f"{part}.{key}" for part in _sets(fields) for key in ("images", "labels")),
        "output",
    ),
)

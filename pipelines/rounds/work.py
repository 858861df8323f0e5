"""What every step of a round is given: its config, its state, and the configs of the commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.dispatch.tally import Caller
from pipelines.policy.fit import FOLDS
from pipelines.rounds.labelled import Labelled, keys_file, labelled_sets
from pipelines.rounds.round_config import ROUND_PAGE, RoundConfig
from pipelines.rounds.state import RoundState, StepRecord
from pipelines.training.config import DataConfig, TrainConfig
from storage.errors import ConfigError
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.open import open_store
from storage.urls import parse_url
from workers.checkpoints.cache import fetch_checkpoint
from workers.checkpoints.file import Checkpoint, read_checkpoint
from workers.local_folders import cache_folder

_EPOCHS = 30  # where the config says nothing about the length of a training
_LOW_FLOOR = 0.01  # mAP counts boxes far below any threshold of use


@dataclass(frozen=True)
class RoundWork:
    """A round under way.

    Attributes:
        store: its output.
        address: of a Ray cluster; None: RAY_ADDRESS, else a Ray of its own.
        console: where trainings show their progress; None: they do not.
        held: what stays open between steps.
    """

    config: RoundConfig
    store: ObjectStore
    caller: Caller
    address: str | None = None
    console: Console | None = None
    held: ExitStack = field(default_factory=ExitStack)

    @staticmethod
    def of(
        config: RoundConfig,
        caller: Caller | None = None,
        *,
        address: str | None = None,
        console: Console | None = None,
    ) -> RoundWork:
        """Open a round's output. Nothing is written."""
        store = open_store(config.output, config.storage.options())
        return RoundWork(config, store, caller or Caller(), address, console)

    @property
    def options(self) -> StorageOptions:
        """How storage is reached."""
        return self.config.storage.options()

    @cached_property
    def state(self) -> RoundState:
        """The records of the steps."""
        return RoundState(self.store)

    @cached_property
    def folder(self) -> Path:
        """A local folder for trainings and small files: below the output where that is local."""
        if self.config.work is not None:
            return Path(parse_url(self.config.work).path)
        place = parse_url(self.config.output)
        if place.scheme == "file":
            return Path(place.path) / "work"
        return cache_folder() / "rounds" / self.config.name

    @cached_property
    def labelled(self) -> Labelled:
        """The labelled images, split."""
        least = 1 if self.config.skips("fit") else FOLDS
        return labelled_sets(self.config.truth, self.config.val, self.folder, least=least)

    def url(self, place: str) -> str:
        """Return the URL of something below the output."""
        return f"{self.store.url}/{place}"

    def note(self, text: str) -> None:
        """Tell people."""
        self.caller.watcher.note(text)

    def hold_ray(self) -> None:
        """Open the Ray that the labelling of several steps shares; ``held.close`` ends it."""
        self.held.enter_context(ray_cluster(self.address))

    # Configs of the commands

    def run_config(
        self, place: str, source: Mapping[str, Any], model: Mapping[str, Any], **more: Any
    ) -> RunConfig:
        """Return the config of a labelling run below the output, with the round's `run` on top.

        Args:
            place: folder below the output.
            source: as `source` of a run.
            model: as `model` of a run.
            more: other sections.

        Raises:
            ConfigError: the fields of `run` cannot be used.
        """
        fields = {
            "name": self.config.name,
            "source": dict(source),
            "output": self.url(place),
            "model": {"artefacts": self.url("artefacts"), **model},
            "storage": self.config.storage.model_dump(exclude_unset=True),
            **more,
        }
        where = f"`run` of the round {self.config.name}"
        return parse_config(RunConfig, merged(fields, self.config.run), where=where)

    def measured_on(self, data: DataConfig, name: str) -> dict[str, Any]:
        """Return the source that holds exactly the images of a COCO set."""
        keys = keys_file(data, self.folder / f"{name}_keys.csv")
        return {"url": str(data.images), "keys": str(keys), "max_absent_keys": 1.0}

    def measuring(self, place: str, data: DataConfig, model: Mapping[str, Any]) -> RunConfig:
        """Return the config of a run over a labelled set, down to the scores that mAP counts."""
        low = {**model, "score_floor": _LOW_FLOOR}
        return self.run_config(place, self.measured_on(data, place.replace("/", "_")), low)

    def train_config(self, role: str, record: StepRecord, **fields: Any) -> TrainConfig:
        """Return the config of a training of this round.

        Args:
            role: ``teacher`` or ``student``.
            record: of the step; its place is the folder of the training.
            fields: those that the round's own go over.
        """
        own = {**self.config.train, **(self.config.student if role == "student" else {})}
        if "model" in self.config.train and "model" in own:
            own["model"] = {**self.config.train["model"], **own["model"]}
        if own.get("steps") is None and own.get("epochs") is None:
            own["epochs"] = _EPOCHS
        base = {
            "name": self.config.name if role == "student" else f"{self.config.name}-teacher",
            "output": str(self.folder / record.place),
            "val": self.labelled.val.model_dump(),
            "storage": self.config.storage.model_dump(exclude_unset=True),
            **fields,
        }
        where = f"`train` or `student` of the round {self.config.name}"
        return parse_config(TrainConfig, merged(base, own), where=where, page=ROUND_PAGE)

    def checkpoint(self, url: str) -> Checkpoint:
        """Open a checkpoint at any URL."""
        return read_checkpoint(fetch_checkpoint(url, self.options, sha256=None))

    def put_json(self, key: str, fields: Mapping[str, Any]) -> str:
        """Write JSON below the output; return its URL."""
        self.store.put(key, json.dumps(fields, indent=1).encode() + b"\n")
        return self.url(key)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings put together; a value of ``over`` wins."""
    made = dict(base)
    for key, value in over.items():
        below = made.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        made[key] = value
    return made


def previous_student(url: str, options: StorageOptions) -> dict[str, Any]:
    """Return what the student step of an earlier round left.

    Raises:
        ConfigError: there is no round, or it has no student yet.
    """
    record = RoundState(open_store(url, options)).read("student")
    if record is None or record.status != "done":
        raise ConfigError(
            f"previous: the round at {url} has no student yet",
            hint="finish it first: `labelfleet round` with its own config",
        )
    return record.result

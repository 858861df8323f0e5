"""The config of ``labelfleet suite``: parsed once, frozen; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from pipelines.config.part import LocalPath, Name, Part
from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import overridden_yaml, parse_config
from pipelines.suite.splits import SPLITS, Splits, coco_splits, is_export, roboflow_splits
from pipelines.training.config import TRAIN_PAGE, TrainConfig
from storage.errors import ConfigError

SUITE_PAGE = "docs/suite.md"
_SCORE_FLOOR = 0.01  # mAP counts boxes far below any threshold of use
# What the suite itself fills in for each data set.
_OWN_TRAINING = ("name", "output", "train", "val", "test")
_OWN_RUN = ("name", "source", "output", "model", "review", "gate")


class SuiteSet(Part):
    """One data set: a Roboflow export, or COCO files over a folder of images."""

    name: Name = Field(description="Names its folder below `output`; unique.")
    domain: str = Field("", description="Sets of a domain are averaged by themselves.")
    export: LocalPath | None = Field(
        None,
        description="Folder with train, valid and test, each with `_annotations.coco.json`.",
    )
    images: LocalPath | None = Field(None, description="Folder that `file_name` is relative to.")
    train: LocalPath | None = Field(None, description="COCO JSON; needed to train.")
    valid: LocalPath | None = Field(None, description="COCO JSON; needed to train.")
    test: LocalPath | None = Field(None, description="COCO JSON; the images that are measured.")
    training: dict[str, Any] = Field(
        {}, description="Fields of a training that differ from the suite's."
    )
    model: dict[str, Any] = Field(
        {}, description="Fields of a run's `model` that differ from the suite's."
    )

    @model_validator(mode="after")
    def _one_form(self) -> SuiteSet:
        stated = [name for name in ("images", *SPLITS) if getattr(self, name) is not None]
        if self.export is not None and stated:
            raise ValueError(f"give `export`, or `images` and COCO files, not both ({stated[0]})")
        if self.export is None and (self.images is None or self.test is None):
            raise ValueError("give `export`, or `images` and `test`")
        return self

    def splits(self) -> Splits:
        """Find its files. Raises ConfigError when they are not there."""
        if self.export is not None:
            return roboflow_splits(self.export)
        stated = {name: path for name in SPLITS if (path := getattr(self, name)) is not None}
        return coco_splits(self.images or Path(), stated)


class SuiteConfig(Part):
    """Data sets, and what is done with each."""

    name: Name = Field("suite", description="In the title of the table.")
    output: LocalPath = Field(description="Local folder for everything that is made.")
    sets: tuple[SuiteSet, ...] = Field((), description="Data sets, one by one.")
    exports: LocalPath | None = Field(
        None, description="A folder of Roboflow exports: each subfolder is a data set more."
    )
    domains: dict[str, tuple[str, ...]] = Field(
        {}, description="Names of data sets by their domain."
    )
    training: dict[str, Any] | None = Field(
        None,
        description="Fields of a training (docs/train_configuration.md) without name, output and "
        "data; none: `model.checkpoint` is taken as it is.",
    )
    model: dict[str, Any] = Field(
        {},
        description="The `model` section of a run (docs/configuration.md). The score floor is "
        "0.01 unless stated.",
    )
    run: dict[str, Any] = Field({}, description="Other sections of a run: workers, max_pixels, …")

    @field_validator("output", "exports", mode="before")
    @classmethod
    def _local(cls, value: Any) -> Any:
        if not isinstance(value, str) or "://" not in value:
            return value
        if value.startswith("file://"):
            return value.removeprefix("file://")
        raise ValueError("a local folder is expected: training reads and writes local files")

    @model_validator(mode="after")
    def _usable(self) -> SuiteConfig:
        if not self.sets and self.exports is None:
            raise ValueError("neither `sets` nor `exports`: there is nothing to measure")
        for section, own in (("training", _OWN_TRAINING), ("run", _OWN_RUN)):
            stated = getattr(self, section) or {}
            if twice := [name for name in own if name in stated]:
                raise ValueError(f"{section}.{twice[0]} is filled in for each data set")
        if self.training is None and "checkpoint" not in self.model:
            raise ValueError("give `training`, or `model.checkpoint`")
        if self.training is not None and "checkpoint" in self.model:
            raise ValueError(
                "`training` makes the checkpoint that is measured; `training.model.checkpoint` is "
                "what it starts from"
            )
        return self

    def data_sets(self) -> tuple[SuiteSet, ...]:
        """Return all data sets, those of ``exports`` after the others, by name.

        Raises:
            ConfigError: a name twice, a domain that names no data set, or no export there.
        """
        found = [*self.sets]
        if self.exports is not None:
            if not self.exports.is_dir():
                raise ConfigError(
                    f"exports: there is no folder {self.exports}",
                    hint="paths are relative to the folder the command is started in",
                )
            folders = sorted(f for f in self.exports.iterdir() if is_export(f))
            if not folders:
                raise ConfigError(
                    f"exports: no folder in {self.exports} holds test/_annotations.coco.json",
                    hint="export the data sets as COCO, each into a folder of its own",
                )
            found += [SuiteSet(name=folder.name, export=folder) for folder in folders]
        names = [one.name for one in found]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two data sets are called {twice[0]}")
        by_name = {name: domain for domain, those in self.domains.items() for name in those}
        if strange := [name for name in by_name if name not in names]:
            raise ConfigError(
                f"domains names a data set that the suite does not have: {strange[0]}",
                hint=f"it has {', '.join(names)}",
            )
        return tuple(
            one if one.domain else one.model_copy(update={"domain": by_name.get(one.name, "")})
            for one in found
        )

    def train_config(self, one: SuiteSet, folder: Path, data: dict[str, Any]) -> TrainConfig:
        """Return the training of a data set. ``data``: the sections train and val."""
        fields = {
            **_merged(self.training or {}, one.training),
            "name": one.name, "output": str(folder), **data,
        }  # fmt: skip
        return parse_config(TrainConfig, fields, where=f"training of {one.name}", page=TRAIN_PAGE)

    def run_config(
        self, one: SuiteSet, output: Path, source: dict[str, Any], checkpoint: str | None
    ) -> RunConfig:
        """Return the run that labels a data set's test images."""
        model = _merged({"score_floor": _SCORE_FLOOR, **self.model}, one.model)
        if checkpoint is not None:
            model["checkpoint"] = checkpoint
        fields = {
            **self.run, "name": one.name, "source": source, "output": str(output), "model": model,
        }  # fmt: skip
        return parse_config(RunConfig, fields, where=f"run of {one.name}")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the fields of ``over``, section by section."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def load_suite_config(path: str, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read a suite's config; ``overrides`` are ``key.sub=value`` texts.

    Raises:
        ConfigError: naming the file, the key, what is wrong and the nearest valid key.
    """
    fields = overridden_yaml(path, overrides, SUITE_PAGE, command="suite")
    return parse_config(SuiteConfig, fields, where=path, page=SUITE_PAGE)

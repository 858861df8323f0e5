"""A training's config is submitted like a run's: what travels, and what its job starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.cluster.bundle import CONFIG_NAME, bundle_run
from pipelines.config.yaml_files import read_yaml
from pipelines.training.config import load_train_config
from pipelines.training.team.submission import TRAINING, kind_of
from storage.errors import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("train.json", "val.json", "held_out.json", "more.json"):
        (tmp_path / name).write_text(f'"{name}"')
    config = {
        "name": "cells", "output": "s3://bucket/cells", "steps": 10, "workers": {"count": 2},
        "train": {"annotations": "train.json", "images": "images"},
        "val": {"annotations": "val.json", "images": "images"},
        "test": {"held_out": {"annotations": "held_out.json", "images": "images"}},
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_training_is_told_from_a_run(here: Path) -> None:
    (here / "run.yaml").write_text("name: x\nsource: {url: images}\noutput: out\n")
    assert kind_of(read_yaml("train.yaml")).command == "train"
    assert kind_of(read_yaml("run.yaml")).command == "run"


def test_annotations_travel_and_images_stay_where_the_cluster_sees_them(here: Path) -> None:
    bundle = bundle_run("train.yaml", kind=TRAINING)
    assert bundle.command == "train"
    assert bundle.output == "s3://bucket/cells"
    assert sorted(path.name for path in bundle.files.values()) == [
        "held_out.json", "train.json", "val.json",
    ]  # fmt: skip
    job = here / "job"
    job.mkdir()
    bundle.write(job)
    fields = yaml.safe_load((job / CONFIG_NAME).read_text())
    assert fields["train"]["images"] == f"file://{here}/images"
    assert (job / fields["test"]["held_out"]["annotations"]).read_text() == '"held_out.json"'


def test_in_the_jobs_folder_the_packed_config_means_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = load_train_config("train.yaml")
    bundle = bundle_run("train.yaml", kind=TRAINING)
    job = here / "job"
    job.mkdir()
    bundle.write(job)
    monkeypatch.chdir(job)
    packed = load_train_config(CONFIG_NAME)
    assert packed.val.images == here / "images"
    assert packed.val.annotations.read_text() == '"val.json"'
    assert (packed.workers, packed.remote) == (local.workers, "s3://bucket/cells")


def test_sources_of_a_list_travel_too(here: Path) -> None:
    config = yaml.safe_load((here / "train.yaml").read_text())
    config["train"] = [
        {"annotations": "train.json", "images": "images", "share": 0.5},
        {"annotations": "more.json", "images": "images", "share": 0.5},
    ]
    (here / "train.yaml").write_text(yaml.safe_dump(config))
    bundle = bundle_run("train.yaml", kind=TRAINING)
    assert bundle.fields["train"][1]["annotations"] == "train.1.annotations-more.json"
    config["output"] = str(here / "out")  # stages need a folder that all workers see
    config["stages"] = [
        {"name": "one", "train": {"annotations": "more.json", "images": "images"}},
        {"name": "two", "train": [{"annotations": "more.json", "images": "images"}]},
    ]
    (here / "train.yaml").write_text(yaml.safe_dump(config))
    one, two = bundle_run("train.yaml", kind=TRAINING).fields["stages"]
    assert one["train"]["annotations"] == "stages.0.train.annotations-more.json"
    assert one["train"]["images"] == f"file://{here}/images"
    assert two["train"][0]["annotations"] == "stages.1.train.0.annotations-more.json"
    (here / "more.json").unlink()
    with pytest.raises(ConfigError, match=r"train\.1\.annotations: there is no file"):
        bundle_run("train.yaml", kind=TRAINING)

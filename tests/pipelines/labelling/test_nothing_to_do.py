"""A run with nothing to do ends at once: Ray is not started, and the summary says so."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.config.run_config import RunConfig
from pipelines.labelling.open_run import open_run, refresh_listing
from pipelines.labelling.run import label_run
from pipelines.labelling.summary import RunSummary
from pipelines.labelling.view import run_table
from storage.errors import ConfigError
from tests.support.samples.synthetic_run import commit_rows, row
from tests.support.samples.tiny_run import fill_folder, run_config

NO_CLUSTER = "127.0.0.1:1"  # whoever asks for Ray there gets a ConfigError


@pytest.fixture
def config(tmp_path: Path, nano_checkpoint: Path) -> RunConfig:
    return run_config(tmp_path / "in", tmp_path / "out", nano_checkpoint)


def label_all(config: RunConfig) -> None:
    run = open_run(config, cuda=False)
    listing, _ = refresh_listing(run, config)
    committed = run.manifest.committed()
    for shard in listing.live_shards(skip=committed):
        commit_rows(run.manifest, shard, [row(o.key, shard.shard_id) for o in shard.objects])


def shown(summary: RunSummary) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(run_table(summary))
    return console.export_text()


def test_ray_is_started_only_where_something_is_left(tmp_path: Path, config: RunConfig) -> None:
    fill_folder(tmp_path / "in", 5)
    with pytest.raises(ConfigError, match="no Ray cluster"):  # a new run: are there GPUs?
        label_run(config, address=NO_CLUSTER)
    label_all(config)
    summary = label_run(config, address=NO_CLUSTER)
    assert (summary.images, summary.new_images, summary.left) == (5, 0, 0)
    assert (summary.outcome, summary.exit_code) == ("done", 0)
    assert (summary.images_per_s, summary.startup_s) == (0, 0)
    assert "nothing to do" in shown(summary)
    assert "images/s" not in shown(summary)
    fill_folder(tmp_path / "in", 1, first=5)  # found while the source is listed
    with pytest.raises(ConfigError, match="no Ray cluster"):
        label_run(config, address=NO_CLUSTER)


def test_the_pace_says_that_start_up_is_left_out_of_it(config: RunConfig, tmp_path: Path) -> None:
    fill_folder(tmp_path / "in", 1)
    label_all(config)
    done = label_run(config, address=NO_CLUSTER)
    text = shown(replace(done, new_images=100, seconds=30.0, startup_s=25.0, images_per_s=20.0))
    assert "100 images in 30.0 s" in text
    assert "25.0 s of them start-up" in text
    assert "then 20.0 images/s" in text

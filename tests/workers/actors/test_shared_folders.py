"""A worker on a node that lacks a run's folders does not start there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.errors import ConfigError
from workers.actors.shared_folders import check_folders
from workers.spec import WorkerSpec


@pytest.fixture
def spec(tmp_path: Path) -> WorkerSpec:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/run.json").write_text("{}")
    model: Any = None  # never looked at
    return WorkerSpec(model, f"file://{tmp_path}/in", f"file://{tmp_path}/out")


def test_where_both_folders_are_it_starts(spec: WorkerSpec) -> None:
    check_folders(spec)


def test_an_output_without_the_run_is_another_folder(spec: WorkerSpec, tmp_path: Path) -> None:
    (tmp_path / "out/run.json").unlink()
    with pytest.raises(ConfigError, match=r"out is not the same folder on every node"):
        check_folders(spec)


def test_a_source_that_is_not_here(spec: WorkerSpec, tmp_path: Path) -> None:
    (tmp_path / "in").rmdir()
    with pytest.raises(ConfigError, match=r"in is not the same folder on every node"):
        check_folders(spec)


def test_only_folders_are_looked_for(spec: WorkerSpec) -> None:
    check_folders(replace(spec, source_url="s3://plates/in", output_url="s3://plates/out"))

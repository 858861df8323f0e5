"""A round's config is submitted like a run's: what travels, and what its job starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.cli.submit import refuse_foreign
from pipelines.cluster.bundle import CONFIG_NAME, bundle_run
from pipelines.rounds.round_config import load_round_config
from pipelines.rounds.state import refuse_unknown_steps
from pipelines.rounds.submission import ROUND, kind_of
from pipelines.rounds.work import RoundWork
from storage.errors import ConfigError

FILES = (
    *("truth.json", "test.json", "val.json", "keys.csv", "policy.yaml", "arch.yaml"),
    *("gold.json", "shape.yaml"),
    *("teacher.safetensors", "large.safetensors", "first.safetensors"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("pool", "images", "more"):
        (tmp_path / name).mkdir()
    for name in FILES:
        (tmp_path / name).write_text(f'"{name}"')
    write(tmp_path)
    return tmp_path


def write(folder: Path, **more: Any) -> None:
    def part(name: str) -> dict[str, str]:
        return {"annotations": f"{name}.json", "images": "images"}

    config = {
        "name": "cells", "output": "out",
        "pool": {"url": "pool", "keys": "keys.csv"},
        "truth": part("truth"), "test": part("test"), "val": part("val"),
        "teacher": {"checkpoint": "teacher.safetensors"},
        "train": {"model": {"arch": "arch.yaml", "checkpoint": "first.safetensors"}},
        "student": {"distill": {"mode": "teacher", "teacher": "large.safetensors"}},
        "policy": "policy.yaml",
        "review": {"url": "http://127.0.0.1:8080", "project": "x", "answers_from": ["more"],
                   "gold": 2, "gold_truth": "gold.json"},
        "run": {"model": {"arch": "shape.yaml"}}, "work": "work here",
        **more,
    }  # fmt: skip
    (folder / "round.yaml").write_text(yaml.safe_dump(config))


def test_a_round_is_told_from_trainings_and_runs(here: Path) -> None:
    (here / "run.yaml").write_text("name: x\nsource: {url: images}\noutput: out\n")
    data = "{annotations: truth.json, images: images}"
    (here / "train.yaml").write_text(f"name: x\noutput: out\ntrain: {data}\nval: {data}\n")
    found = [kind_of(name).command for name in ("round.yaml", "train.yaml", "run.yaml")]
    assert found == ["round", "train", "run"]


def test_in_the_jobs_folder_the_packed_config_means_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = load_round_config("round.yaml")
    bundle = bundle_run("round.yaml", kind=kind_of("round.yaml"))
    assert (bundle.command, bundle.output) == ("round", f"file://{here}/out")
    assert sorted(path.name for path in bundle.files.values()) == sorted(FILES)
    job = here / "job"
    job.mkdir()
    bundle.write(job)
    monkeypatch.chdir(job)
    packed = load_round_config(CONFIG_NAME)
    assert packed.truth.images == packed.test.images == here / "images"
    assert packed.pool.url == f"file://{here}/pool"
    assert packed.truth.annotations.read_text() == '"truth.json"'
    assert Path(packed.train["model"]["arch"]).read_text() == '"arch.yaml"'
    assert Path(packed.student["distill"]["teacher"]).read_text() == '"large.safetensors"'
    assert packed.review is not None
    assert packed.review.answers_from == (f"file://{here}/more",)
    assert Path(str(packed.review.gold_truth)).read_text() == '"gold.json"'
    assert Path(packed.run["model"]["arch"]).read_text() == '"shape.yaml"'
    assert RoundWork.of(packed).folder == here / "work here"
    assert packed.fit == local.fit


def test_the_files_of_stages_and_an_earlier_round_are_found(here: Path) -> None:
    taught = {"mode": "teacher", "teacher": "large.safetensors"}
    student = {"stages": [{"name": "a", "steps": 1}, {"name": "b", "steps": 1, "distill": taught}]}
    write(here, student=student, teacher=None, previous="earlier")
    fields = bundle_run("round.yaml", kind=ROUND).fields
    name = "student.stages.1.distill.teacher-large.safetensors"
    assert fields["student"]["stages"][1]["distill"]["teacher"] == name
    assert fields["previous"] == f"file://{here}/earlier"


def test_a_policy_of_fields_and_a_config_of_few_fields_need_no_files(here: Path) -> None:
    write(here, policy={"accept": 0.5, "reject": 0.2}, train={}, student={}, review=None, run={},
          teacher=None, pool={"url": "s3://cells/pool"})  # fmt: skip
    bundle = bundle_run("round.yaml", kind=ROUND)
    assert sorted(path.name for path in bundle.files.values()) == [
        "test.json", "truth.json", "val.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field"),
    [("gold.json", "review.gold_truth"), ("shape.yaml", "run.model.arch"),
     ("first.safetensors", "train.model.checkpoint"),
     ("large.safetensors", "student.distill.teacher")],
)  # fmt: skip
def test_a_file_that_a_later_step_reads_is_missed_before_the_first(
    here: Path, name: str, field: str
) -> None:
    (here / name).unlink()
    with pytest.raises(ConfigError, match=f"{field}: there is nothing at .*{name}"):
        load_round_config("round.yaml")


def test_what_is_absent_is_named_before_anything_is_sent(here: Path) -> None:
    (here / "truth.json").unlink()
    with pytest.raises(ConfigError, match=r"truth\.annotations: there is no file .*truth\.json"):
        bundle_run("round.yaml", kind=ROUND)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("round", (["--limit", "3"], []), "--limit and --strict are of runs, and this is a round"),
        ("train", ([], ["--only", "fit"]), "--again are of rounds, and this is a training's"),
        ("run", ([], ["--again", "fit"]), "--again are of rounds, and this is a run's"),
    ],
)
def test_options_of_another_command_are_refused(
    command: str, options: tuple[list[str], list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_foreign(command, *options)


def test_a_step_that_there_is_not_is_refused_before_a_cluster_is_asked(here: Path) -> None:
    done = CliRunner().invoke(app, ["submit", "round.yaml", "--again", "studnet"])
    assert isinstance(done.exception, ConfigError)
    assert "a round has no step 'studnet'" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "end"),
    [
        (("student", None, ("student", "label")), "--only student"),
        ((None, "teacher", ("label",)), "--until teacher"),
    ],
)
def test_a_step_to_repeat_that_is_left_out_is_refused(
    options: tuple[str | None, str | None, tuple[str, ...]], end: str
) -> None:
    with pytest.raises(ConfigError, match=f"--again label and {end} contradict") as caught:
        refuse_unknown_steps(*options)
    assert caught.value.exit_code == 2
    refuse_unknown_steps(None, "label", ("teacher", "label"))
    refuse_unknown_steps("label", None, ("label",))

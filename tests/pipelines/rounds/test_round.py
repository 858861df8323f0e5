"""A whole round on the demo's digits, in processes that are killed; and its page in a browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.demo.digits import make_pages
from pipelines.demo.run import checkpoint_path
from pipelines.exports.model_card import read_card_facts
from pipelines.rounds.round import run_round
from pipelines.rounds.round_config import load_round_config
from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from storage.runs.manifest import Manifest
from tests.e2e.test_report_browser import CHROMIUM, browse
from tests.support.patience import patient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KILLED_IN = ("gate", "label", "student")


def data(folder: Path) -> dict[str, str]:
    return {"annotations": str(folder / "truth.json"), "images": str(folder / "images")}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of few pages and few steps."""
    root = tmp_path_factory.mktemp("round")
    make_pages(root / "pool", images=16, seed=4, split="train", broken=False)
    make_pages(root / "truth", images=24, seed=5, split="val", hard_share=0, broken=False)
    make_pages(root / "test", images=8, seed=6, broken=False)
    fields = {
        "name": "digits",
        "output": str(root / "out"),
        "pool": {"url": str(root / "pool" / "images")},
        "truth": data(root / "truth"),
        "test": data(root / "test"),
        "teacher": {"checkpoint": str(checkpoint_path()), "licence": "CC-BY-NC-4.0"},
        "gate": 0.3,
        "train": {
            "steps": 4, "batch_size": 2, "eval_every": 2, "warmup_steps": 1, "lr": 1e-4,
            "augment": {"flip_horizontal": 0},
        },
        "run": {"model": {"runtime": "torch"}},
        "skip": ["compile"],
    }  # fmt: skip
    path = root / "round.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def started(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli.main", "round", str(config), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(config: Path) -> tuple[int, dict[str, Any], str]:
    process = started(config)
    out, err = process.communicate(timeout=patient(120))
    return process.returncode, json.loads(out.splitlines()[-1]) if out else {}, err


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + patient(90)
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status(config: Path, step: str) -> str:
    path = config.parent / "out" / "state" / f"{step}.json"
    return json.loads(path.read_text())["status"] if path.exists() else ""


@pytest.fixture(scope="module")
def summary(config: Path) -> dict[str, Any]:
    """Of the last of four processes; each of the others was killed in another step."""
    for step in KILLED_IN:
        process = started(config)
        until(lambda: status(config, step) == "begun", process)  # noqa: B023 - called at once
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert status(config, step) == "begun"
    code, found, err = finished(config)
    assert code == 0, err
    return found


def test_a_round_that_is_killed_three_times_ends_with_every_step_done_once(
    summary: dict[str, Any], config: Path
) -> None:
    steps = summary["steps"]
    people = dict.fromkeys(("route", "push", "pull"), "skipped")
    assert {name: one["status"] for name, one in steps.items()} == {
        **dict.fromkeys(("teacher", "gate", "label", "fit", "decide", "student"), "done"),
        **people, "evaluate": "done", "compile": "skipped", "page": "done",
    }  # fmt: skip
    assert {one["attempt"] for one in steps.values()} == {1}
    assert summary["left"] == []
    assert summary["new"] == [
        "student",
        "evaluate",
        "page",
    ]  # what the killed ones had finished stays
    pool = Manifest.open(str(config.parent / "out" / "label"))
    assert len(pool.committed()) == 1
    assert summary["version"] == "v0001"


def test_it_says_who_won_with_an_interval(summary: dict[str, Any]) -> None:
    overall = summary["comparison"]["overall"]
    assert 40 < overall["teacher"] <= 100
    assert overall["low"] <= overall["gain"] <= overall["high"]
    assert overall["gain"] == pytest.approx(overall["student"] - overall["teacher"])
    assert summary["comparison"]["images"] == 8
    assert len(summary["comparison"]["classes"]) == 10
    assert summary["verdict"] == summary["comparison"]["sentence"]


def test_the_student_says_where_it_comes_from(summary: dict[str, Any], config: Path) -> None:
    facts = read_card_facts(summary["student"]["checkpoint"], StorageOptions())
    assert facts.non_commercial
    assert "CC-BY-NC-4.0" in facts.licence
    assert len(facts.data()) == 2
    parents = {one.role for one in facts.ancestors if one.depth == 1}
    assert parents == {"first weights", "labels"}
    card = (config.parent / "out" / "student" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    tested = {r["dataset"]["name"]: r["metrics"][0] for r in front["model-index"][0]["results"]}
    assert tested["test"]["value"] == pytest.approx(
        summary["comparison"]["overall"]["student"] / 100, abs=1e-3
    )
    assert tested["val"]["type"] == "mAP"
    assert front["pipeline_tag"] == "object-detection"
    assert front["library_name"] == "labelfleet"
    assert "Not for commercial use" in card


def test_the_same_command_has_nothing_left_to_do_and_a_change_is_refused_by_name(
    summary: dict[str, Any], config: Path
) -> None:
    again = run_round(load_round_config(str(config))).to_fields()
    assert again["new"] == []
    assert again["comparison"] == summary["comparison"]
    with pytest.raises(ConfigError, match=r"the step student .*: training\.lr\n") as refused:
        run_round(load_round_config(str(config), ("student.lr=0.01",)))
    assert "--again student" in (refused.value.hint or "")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_the_page_shows_in_a_browser(summary: dict[str, Any], config: Path, tmp_path: Path) -> None:
    page = config.parent / "out" / "round.html"
    assert summary["page"].endswith("/out/round.html")
    shown = browse(page, tmp_path, "--dump-dom")
    assert summary["verdict"] in shown
    assert "Not for commercial use." in shown
    for title in ("Teacher against student", "What the labels were", "What it cost"):
        assert title in shown
    assert shown.count("<svg") == 3
    assert 'src="http' not in shown

"""The review commands that need no server, and what the others say without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.main import main
from pipelines.label_studio.token import VARIABLE
from storage.review.queue import queue_parts, read_head
from storage.review.settings import ReviewSettings, write_settings
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.review_samples import loose_run

COMMANDS = (
    ("review", "route"), ("review", "push"), ("review", "pull"), ("review", "refresh"),
    ("review", "status"),
    ("decide",), ("diff",), ("export",),
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A labelled run in a folder, and no token."""
    monkeypatch.delenv(VARIABLE, raising=False)
    loose_run(open_store(str(tmp_path / "in")), open_store(str(tmp_path / "run")), 10)
    return str(tmp_path / "run")


def call(
    capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    """Run a command: the JSON of its last line ({} without), and stderr."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    said = capsys.readouterr()
    assert left.value.code == code, said.err
    lines = said.out.strip().splitlines()
    return (json.loads(lines[-1]) if "--json" in arguments else {}), said.err


def test_from_a_run_to_a_data_set_without_anybody_answering(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routed, _ = call(capsys, "review", "route", run, "--budget", "4 images", "--json")
    assert routed["audit"] + routed["value"] == 4
    status, _ = call(capsys, "review", "status", run, "--json")
    assert (status["queued"], status["pushed"], status["answered"]) == (4, None, 0)
    assert VARIABLE in status["problem"]
    first, _ = call(capsys, "decide", run, "--json")
    second, _ = call(capsys, "decide", run, "--accept", "0.3", "--json")
    assert (first["counts"]["labels"], second["counts"]["labels"]) == (10, 20)
    diff, _ = call(capsys, "diff", run, "v0001", "--json")
    assert diff["boxes"]["to_label"] == 10
    dest = tmp_path / "coco"
    exported, _ = call(capsys, "export", run, str(dest), "--format", "coco", "--json")
    assert (exported["version"], exported["labels"]) == ("v0002", 20)
    assert (dest / "annotations.json").exists()


def test_an_export_that_leaves_images_out_exits_with_3(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "decide", run)
    gone = sorted(path for path in (tmp_path / "in").rglob("*.jpg"))[0]
    gone.unlink()
    arguments = ("export", run, str(tmp_path / "out"), "--format", "yolo", "--images", "copy")
    said, _ = call(capsys, *arguments, "--json", code=3)
    assert (said["images"], said["left_out"]) == (9, 1)
    assert gone.name in said["first_problem"]


@pytest.mark.slow
def test_people_see_tables(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("review", "route", run, "--budget", "5 minutes"),
        ("decide", run),
        ("diff", run, "v0001", "latest"),
        ("review", "status", run),
    ):
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        assert left.value.code == 0
        assert "│" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["push", "pull"])
def test_without_a_token_nothing_is_done(
    command: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = call(capsys, "review", command, run, code=2)
    assert VARIABLE in err
    assert not (Path(run) / "review").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("review", "route", "RUN", "--budget", "lots"), "500 images"),
        (("review", "route", "RUN", "--budget", "5 images", "--audit", "2"), "--audit"),
        (("decide", "RUN", "--accept", "0.05"), "above accept"),
        (("decide", "RUN", "--settle", "coin"), "agreement"),
        (("diff", "RUN", "v0009"), "label version"),
        (("export", "RUN", "/nowhere", "--format", "voc"), "coco, yolo, hf"),
        (("review", "push", "RUN", "--presigned", "30"), "1 to 7"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    arguments: tuple[str, ...], said: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [run if argument == "RUN" else argument for argument in arguments]
    _, err = call(capsys, *given, code=2)
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    assert f"Example: labelfleet {' '.join(command)}" in capsys.readouterr().out


def test_the_commands_load_nothing_heavy() -> None:
    heavy = ["torch", "ray", "cv2", "pyarrow", "httpx", "sklearn", "matplotlib"]
    code = f"import sys, pipelines.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_route_and_decide_take_the_projects_other_runs_and_say_so(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = loose_run(open_store(str(tmp_path / "in")), open_store(str(tmp_path / "second")), 10)
    write_settings(second.store, ReviewSettings(rounds=(Manifest.open(run).url,)))
    call(capsys, "review", "route", run, "--budget", "4 images", "--alone", "--json")
    url = str(tmp_path / "second")
    with_it, _ = call(capsys, "review", "route", url, "--budget", "10 images", "--json")
    assert with_it["other_runs"] == [Manifest.open(run).url]
    assert with_it["audit"] + with_it["value"] <= 6
    shutil.rmtree(tmp_path / "second" / "review" / "queue")
    alone, _ = call(capsys, "review", "route", url, "--budget", "10 images", "--alone", "--json")
    assert alone["other_runs"] == []
    assert alone["audit"] + alone["value"] == 10
    with pytest.raises(SystemExit):
        main(["decide", url])
    assert "counts too: " in capsys.readouterr().out
    decided, _ = call(capsys, "decide", url, "--alone", "--json")
    assert decided["other_runs"] == []


def test_the_route_says_what_reviewers_see(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, said = call(capsys, "review", "route", run, "--budget", "1 image", "--show", "x", code=2)
    assert "one of auto, score, none" in said
    call(capsys, "review", "route", run, "--budget", "1 image", "--show", "none", "--json")
    store = Manifest.open(run).store
    assert read_head(store, queue_parts(store)[0]).show == {"how": "none", "above": 0.0}

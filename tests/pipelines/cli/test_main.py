"""The command line: every end is an exit code and, where something is wrong, a readable line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli.common import open_manifest
from pipelines.cli.main import main
from storage.errors import ConfigError
from storage.runs.lock import run_lock
from storage.stores.local import LocalStore
from tests.support.patience import patient
from tests.support.samples.synthetic_run import image_shard, make_run, row
from tests.support.samples.tiny_run import fill_folder, run_fields


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        """The JSON object in the last line of stdout."""
        found = json.loads(self.out.splitlines()[-1])
        assert isinstance(found, dict)
        return found


Call = Callable[..., Ended]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """A command in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def called(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Ended(left.value.code, said.out, said.err)

    return called


@pytest.fixture
def spawn(tmp_path: Path) -> Call:
    """The installed command in a process of its own, with an empty home."""
    (tmp_path / "home").mkdir()

    def spawned(*arguments: object, **variables: str) -> Ended:
        done = subprocess.run(
            [Path(sys.executable).with_name("labelfleet"), *map(str, arguments)],
            capture_output=True, text=True, timeout=patient(280), cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path / "home"), "COLUMNS": "200", **variables},
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    return spawned


@dataclass
class Setting:
    """A config file for six images."""

    folder: Path
    fields: dict[str, Any]

    def write(self, **changes: Any) -> Path:
        path = self.folder / "cells.yaml"
        path.write_text(yaml.safe_dump({**self.fields, **changes}))
        return path


@pytest.fixture
def setting(tmp_path: Path, nano_checkpoint: Path) -> Setting:
    fill_folder(tmp_path / "in", 6)
    return Setting(tmp_path, run_fields(tmp_path / "in", tmp_path / "out", nano_checkpoint))


def is_one_readable_error(ended: Ended) -> bool:
    first, *rest = ended.err.splitlines()
    return (
        first.startswith("error: ")
        and "Traceback" not in ended.err
        and all(line.startswith("  ") for line in rest)
    )


# -- usage


def test_without_arguments_it_shows_what_there_is(call: Call) -> None:
    ended = call()
    assert ended.code == 2
    for command in ("run", "plan", "status", "evaluate", "report", "ingest", "doctor", "demo"):
        assert command in ended.out


def test_help_is_not_an_error(call: Call) -> None:
    assert call("--help").code == 0
    for command in ("run", "plan", "status", "evaluate", "report", "ingest", "train", "doctor"):
        assert call(command, "--help").code == 0


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["runn"], "Did you mean 'run'?", "labelfleet --help"),
        (["run"], "CONFIG", "labelfleet run --help"),
        (["run", "c.yaml", "--limt", "3"], "--limt", "labelfleet run --help"),
        (["run", "c.yaml", "--limit", "0"], "--limit", "labelfleet run --help"),
        (["run", "c.yaml", "--limit", "few"], "--limit", "labelfleet run --help"),
        (["status"], "RUN", "labelfleet status --help"),
        (["evaluate", "out"], "--truth", "labelfleet evaluate --help"),
        (["plan", "a.yaml", "b.yaml"], "b.yaml", "labelfleet plan --help"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_help(
    call: Call, arguments: list[str], said: str, hint: str
) -> None:
    ended = call(*arguments)
    assert ended.code == 2
    assert is_one_readable_error(ended)
    assert said in ended.err
    assert hint in ended.err


def test_wrong_usage_with_json_is_an_object_too(call: Call) -> None:
    ended = call("status", "--json")
    assert (ended.code, ended.last["exit_code"]) == (2, 2)


# -- errors


@pytest.mark.parametrize(
    ("changes", "command", "code", "said"),
    [
        ({"sorce": 1}, "run", 2, "did you mean `source`?"),
        ({"sorce": 1}, "plan", 2, "did you mean `source`?"),
        ({"source": {"url": "none"}}, "run", 1, "does not exist"),
        ({"source": {"url": "none"}}, "plan", 1, "does not exist"),
        ({"policy": "none.yaml"}, "run", 2, "policy: there is nothing at none.yaml"),
        ({"policy": "none.yaml"}, "plan", 2, "policy: there is nothing at none.yaml"),
        ({"output": "in/labels"}, "run", 2, "overlap"),
        ({"output": "in/labels"}, "plan", 2, "overlap"),
        ({"output": "s3://me:hunter2@b/x"}, "run", 2, "credentials"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_a_line_a_hint_and_a_code(
    call: Call, setting: Setting, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
    command: str, code: int, said: str, as_json: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(setting.folder)
    path = setting.write(**changes)
    ended = call(command, path, *["--json"] * as_json)
    assert ended.code == code
    assert is_one_readable_error(ended)
    assert said in ended.err
    assert "  -> " in ended.err
    assert "hunter2" not in ended.err + ended.out
    if as_json:
        assert said in ended.last["error"]
        assert ended.last["hint"]
        assert ended.last["exit_code"] == code
    else:
        assert ended.out == ""
    assert not (setting.folder / "out").exists()


def test_a_missing_config_is_bad_usage(call: Call, tmp_path: Path) -> None:
    ended = call("run", tmp_path / "none.yaml")
    assert ended.code == 2
    assert "none.yaml" in ended.err


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_folder_without_a_run_is_reported_as_such(
    call: Call, tmp_path: Path, command: str
) -> None:
    ended = call(command, tmp_path)
    assert ended.code == 2
    assert "no run at" in ended.err
    assert is_one_readable_error(ended)


@pytest.mark.parametrize(
    ("key", "said", "hint"),
    [
        ("state/teacher.json", "is the output of a round", "its page is {0}/round.html"),
        (
            "run/run.json",
            "is the folder of a demo or of a suite's data set",
            "give its run: {0}/run",
        ),
        ("summary.json", "is the output of a training", "{0}/summary.json"),
    ],
)
@pytest.mark.parametrize("command", ["status", "report"])
def test_what_another_command_left_is_named_with_the_place_to_look(
    call: Call, tmp_path: Path, command: str, key: str, said: str, hint: str
) -> None:
    LocalStore(str(tmp_path)).put(key, b"{}")
    ended = call(command, tmp_path)
    assert ended.code == 2
    assert said in ended.err
    assert hint.format(tmp_path) in ended.err
    assert is_one_readable_error(ended)


def test_an_error_is_not_its_own_cause(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run at") as refused:
        open_manifest(str(tmp_path), None)
    assert refused.value.__cause__ is not refused.value


def test_brackets_in_names_are_not_markup(call: Call, tmp_path: Path) -> None:
    place = tmp_path / "[red]a[1][/]"
    ended = call("status", place)
    assert "[red]a[1][/]" in ended.err.replace("%5B", "[").replace("%5D", "]")


def test_a_run_held_by_another_process_exits_75_and_says_which(
    call: Call, setting: Setting
) -> None:
    with run_lock(LocalStore(str(setting.folder / "out")), "labelfleet run cells"):
        ended = call("run", setting.write(), "--json")
    assert ended.code == 75
    assert f"pid {os.getpid()}" in ended.last["error"]


def test_a_bug_is_a_line_that_asks_for_the_traceback(
    call: Call, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("pipelines.labelling.plan.plan_run", broken)
    ended = call("plan", setting.write())
    assert ended.code == 1
    assert is_one_readable_error(ended)
    assert "ZeroDivisionError: oh" in ended.err
    assert "--debug" in ended.err


def test_ctrl_c_says_how_to_go_on_and_exits_130(
    call: Call, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.labelling.plan.plan_run", interrupted)
    ended = call("plan", setting.write(), "--json")
    assert ended.code == 130
    assert ended.last["error"] == "interrupted"
    assert "run the same command to continue" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("position", ["first", "last"])
def test_debug_anywhere_adds_the_traceback(spawn: Call, tmp_path: Path, position: str) -> None:
    arguments = ["status", str(tmp_path)]
    plain = spawn(*arguments)
    assert is_one_readable_error(plain)
    debug = spawn(*(["--debug", *arguments] if position == "first" else [*arguments, "--debug"]))
    assert debug.code == plain.code == 2
    assert "Traceback" in debug.err
    assert debug.err.endswith(plain.err)


@pytest.mark.slow
def test_a_reader_that_went_away_causes_no_traceback() -> None:
    command = [Path(sys.executable).with_name("labelfleet"), "--help"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=patient(100))
    finally:
        os.close(write)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


# -- what it shows


def test_status_of_a_run(call: Call, tmp_path: Path) -> None:
    shard = image_shard("a.jpg", "b.jpg")
    rows = [row("a.jpg", shard.shard_id), row("b.jpg", shard.shard_id, status="undecodable")]
    make_run(LocalStore(str(tmp_path)), {shard: rows})
    ended = call("status", tmp_path, "--json")
    assert ended.code == 0
    assert ended.last["images"]["ok"] == ended.last["images"]["undecodable"] == 1
    assert call("status", tmp_path).code == 0


def test_plan_of_a_config(call: Call, setting: Setting) -> None:
    ended = call("plan", setting.write(), "--set", "source.shard_size=2", "--json")
    assert ended.code == 0
    assert (ended.last["shards"], ended.last["images"]) == (3, 6)
    people = call("plan", setting.write())
    assert people.code == 0
    assert "images" in people.out


_LOADED = """
import sys
import pipelines.cli.main
try:
    pipelines.cli.main.main(["--help"])
except SystemExit:
    pass
print(",".join(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def test_the_command_line_and_its_help_load_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOADED],
        capture_output=True,
        text=True,
        timeout=patient(100),
        check=True,
    )
    loaded = set(done.stderr.splitlines()[-1].split(","))
    heavy = {"torch", "torchvision", "ray", "pandas", "numpy", "pyarrow", "cv2", "PIL", "boto3",
             "botocore", "fsspec", "matplotlib", "sklearn", "scipy", "super_gradients", "pydantic",
             "httpx", "openvino", "onnxruntime", "rich", "jinja2", "yaml"}  # fmt: skip
    assert "typer" in loaded
    assert not heavy & loaded


def test_without_arguments_there_is_the_help(call: Call) -> None:
    for arguments in ((), ("review",)):
        ended = call(*arguments)
        assert ended.code == 2
        assert ended.out.startswith("Usage: labelfleet")
        assert not ended.err


# -- a whole run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_from_an_empty_home(
    spawn: Call, setting: Setting, shared_ray: dict[str, str]
) -> None:
    (setting.folder / "in/broken.png").write_bytes(b"no image")
    path = setting.write()
    without_token = {**shared_ray, "RAY_AUTH_TOKEN_PATH": "", "RAY_ADDRESS": ""}
    stranger = spawn("run", path, "--address", shared_ray["RAY_ADDRESS"], **without_token)
    assert stranger.code == 2
    assert "RAY_AUTH_TOKEN" in stranger.err
    assert "Traceback" not in stranger.err  # Ray's own C++ may have warned before

    part = spawn("run", path, "--limit", "1", "--json", **shared_ray)
    assert part.code == 0, part.err
    assert (part.last["shards"], part.last["left"], part.last["images"]) == (1, 1, 4)

    whole = spawn("run", path, "--json", **shared_ray)
    assert whole.code == 0, whole.err
    assert whole.last["images"] == 7
    assert (whole.last["ok"], whole.last["undecodable"]) == (6, 1)
    assert (whole.last["shards"], whole.last["left"], whole.last["quarantined"]) == (2, 0, 0)
    assert (whole.last["new_shards"], whole.last["new_images"]) == (1, 3)
    for name in ("too_large", "unsupported", "detections", "seconds", "images_per_s"):
        assert whole.last[name] >= 0
    assert whole.last["output"] == f"file://{setting.folder}/out"
    assert "Traceback" not in whole.err

    strict = spawn("run", path, "--set", "max_bad_share=0.1", **shared_ray)
    assert strict.code == 3, strict.err
    assert "nothing to do" in strict.out
    assert f"file://{setting.folder}/out" in strict.out
    other = spawn("run", path, "--set", "model.score_floor=0.5", **shared_ray)
    assert other.code == 2
    assert "score_floor (0.05 there, 0.5 now)" in other.err


@pytest.mark.slow
def test_a_cluster_that_is_not_there(spawn: Call, setting: Setting) -> None:
    ended = spawn("run", setting.write(), "--address", "127.0.0.1:1")
    assert ended.code == 2
    assert "127.0.0.1:1" in ended.err
    assert is_one_readable_error(ended)

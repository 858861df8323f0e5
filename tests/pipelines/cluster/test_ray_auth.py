"""A local Ray's token and folder: for this user alone, whatever HOME is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cluster.local_ray import private_folder, private_token, sweep


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # which is not there
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr("pipelines.cluster.local_ray._read", [])  # as in a new process


def test_without_a_home_the_token_lies_in_our_folder_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with private_folder(tmp_path) as folder, private_token(folder):
            token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            assert token.parent == folder
            assert token.stat().st_mode & 0o777 == 0o600
            assert folder.stat().st_mode & 0o777 == 0o700
            first = token.read_text()
            assert len(first) == 64
    finally:
        os.umask(before)
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert list(tmp_path.iterdir()) == []  # no home was made, and the folder is gone
    with private_folder(tmp_path) as folder, private_token(folder):  # Ray keeps the first it reads
        assert (folder / "token").read_text() == first


def test_a_token_at_home_is_used_and_closed_to_others(tmp_path: Path) -> None:
    token = tmp_path / "home/.ray/auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("x" * 64)
    token.chmod(0o644)  # as Ray leaves it
    with private_folder(tmp_path) as folder, private_token(folder):
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ
        assert not (folder / "token").exists()
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "x" * 64


def test_the_token_that_ray_has_read_stays_whatever_comes_to_home_or_goes(tmp_path: Path) -> None:
    """Ray reads one a process: a second run would wait five minutes for its own servers."""
    at_home = tmp_path / "home/.ray/auth_token"
    with private_folder(tmp_path) as folder, private_token(folder):
        first = (folder / "token").read_text()
    at_home.parent.mkdir(parents=True)
    at_home.write_text("x" * 64)  # by another Ray, meanwhile
    with private_folder(tmp_path) as folder, private_token(folder):
        assert (folder / "token").read_text() == first
    at_home.write_text(first)
    with private_folder(tmp_path) as folder, private_token(folder):
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    at_home.unlink()
    with private_folder(tmp_path) as folder, private_token(folder):
        assert (folder / "token").read_text() == first


def test_a_token_that_was_given_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    with private_folder(tmp_path) as folder, private_token(folder):
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ
        assert not (folder / "token").exists()


def test_a_link_that_was_planted_is_neither_written_through_nor_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("owner", "kept"):
        (victim / name).write_text("theirs")
    with private_folder(tmp_path) as folder:
        (folder / "token").symlink_to(victim / "kept")
        with pytest.raises(FileExistsError), private_token(folder):
            pass
    (tmp_path / "lf-link").symlink_to(victim)  # as a folder of ours
    trap = tmp_path / "lf-trap"
    trap.mkdir()
    (trap / "owner").symlink_to(victim / "owner")  # as its lock
    sweep(tmp_path)
    assert {path.name: path.read_text() for path in victim.iterdir()} == {
        "owner": "theirs", "kept": "theirs",
    }  # fmt: skip
    assert (trap / "owner").is_symlink()


HOLDS = """
import sys, time
from pathlib import Path
from pipelines.cluster.local_ray import private_folder
with private_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_folders_of_killed_runs_are_swept_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    dead = started[0]
    folders = [Path((process.stdout or sys.stdin).readline().strip()) for process in started]
    stranger = tmp_path / "lf-stranger"  # without an owner file: not one of ours
    stranger.mkdir()
    try:
        dead.kill()
        dead.wait()
        assert folders[0].is_dir()
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([folders[1], stranger])
    finally:
        for process in started:
            process.kill()
            process.wait()
            (process.stdout or sys.stdin).close()

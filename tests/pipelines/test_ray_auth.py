"""Who may talk to a local Ray: this user, with its token; nobody else on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cluster import _private_token

JOIN = """
import ray
ray.init(address={address!r}, log_to_driver=False)
print(ray.get(ray.remote(lambda: "ran").remote()))
"""


def join(environment: dict[str, str], **changed: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | environment | changed
    program = JOIN.format(address=environment["RAY_ADDRESS"])
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_a_local_ray_takes_its_token_and_no_other(
    local_ray: dict[str, str], tmp_path: Path
) -> None:
    assert join(local_ray).stdout == "ran\n"
    (tmp_path / "token").write_text("0" * 64)
    refused = join(local_ray, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"), RAY_AUTH_MODE="token")
    assert refused.returncode != 0
    assert "ran" not in refused.stdout
    none = join(local_ray, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"), RAY_AUTH_MODE="disabled")
    assert none.returncode != 0
    assert "ran" not in none.stdout


def test_the_token_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    _private_token()
    token = tmp_path / ".ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o077 == 0
    made = token.read_text()
    assert len(made) == 64
    token.chmod(0o644)  # as Ray leaves it
    _private_token()
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == made  # a Ray that runs with it goes on
    assert [p.name for p in token.parent.iterdir()] == ["auth_token"]


def test_a_token_that_was_given_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    _private_token()
    assert list(tmp_path.iterdir()) == []

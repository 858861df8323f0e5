"""Who may talk to a local Ray: this user, with its token; nobody else on the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cluster.ray_cluster import _private_token


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

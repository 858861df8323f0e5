"""A run that version 0.1.0 left behind is read, verified, decided and exported by this one."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.main import main

OLD = Path(__file__).resolve().parents[1] / "support/old_runs/v0.1.0.tar.gz"


@pytest.fixture
def old_run(tmp_path: Path) -> str:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return str(tmp_path / "old")


def said(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--json"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    return int(ended.value.code or 0), json.loads(last)


def test_its_rows_are_counted_and_verified(
    old_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, status = said(capsys, "status", old_run)
    assert (code, status["committed"], status["images"]["ok"]) == (0, 1, 8)
    for level in ([], ["--quick"], ["--complete"]):
        code, verified = said(capsys, "verify", old_run, *level)
        differences = [Path(d["key"]).name for d in verified["differences"]]
        assert differences == ["artefact.json"], level  # the compiled model was left out
        assert (code, verified["images"]) == (1, 8)


def test_its_answers_count_and_its_labels_are_exported(
    old_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, version = said(capsys, "decide", old_run, "--alone")
    assert (code, version["version"]) == (0, "v0003")
    assert version["counts"]["answers_used"] == 3
    for name in ("v0002", "v0003"):
        code, _ = said(
            capsys, "export", old_run, str(tmp_path / name), "--format", "coco", "--version", name
        )
        assert code == 0
    images = json.loads((tmp_path / "v0003/annotations.json").read_text())["images"]
    assert len(images) == 8

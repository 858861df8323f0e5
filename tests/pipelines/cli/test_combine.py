"""fuse and compare on the command line: their exit codes, JSON, and one line for wrong input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.cli.main import main
from storage.runs.live_rows import live_rows
from storage.stores.open import open_store
from tests.support.samples.review_samples import committed_run, loose_run
from tests.support.samples.synthetic_run import boxes, image_shard, make_run, row


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs over the same five pictures; the second finds one box less."""
    source = open_store(str(tmp_path / "source"))
    first = loose_run(source, open_store(str(tmp_path / "a")), 5)
    fewer = boxes([(10, 10, 50, 50)], [0.7], [0])
    rows = {one.image_id: replace(one, detections=fewer) for one in live_rows(first)}
    committed_run(source, open_store(str(tmp_path / "b")), rows)
    return tmp_path / "a", tmp_path / "b"


def test_fuse_then_every_reader(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fused"
    code, said, _ = call(capsys, "fuse", *runs, "--out", out, "--name", "both", "--json")
    done = json.loads(said)
    assert (code, done["images"], done["name"], done["waiting"]) == (0, 5, "both", 0)
    code, said, _ = call(capsys, "fuse", *runs, "--out", out, "--name", "both")
    assert (code, "0 fused, 1 before" in said) == (0, True)
    assert call(capsys, "verify", out, "--complete", "--source")[0] == 0
    assert json.loads(call(capsys, "status", out, "--json")[1])["images"]["ok"] == 5
    assert call(capsys, "decide", out)[0] == 0
    assert call(capsys, "report", out)[0] == 0
    assert call(capsys, "export", out, tmp_path / "coco", "--format", "coco")[0] == 0
    assert json.loads((tmp_path / "coco" / "annotations.json").read_text())["images"]


def test_compare(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = call(capsys, "compare", *runs, "--json")
    found = json.loads(said)
    assert (code, found["shared_images"]) == (0, 5)
    assert Path(found["page"].removeprefix("file://")).exists()
    assert call(capsys, "compare", *runs)[0] == 0


def test_wrong_input_is_one_line(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = image_shard("z.jpg")
    rows = [row("z.jpg", shard.shard_id)]
    make_run(open_store(str(tmp_path / "strange")), {shard: rows})
    make_run(open_store(str(tmp_path / "cars")), {shard: rows}, classes=("car",))
    out = tmp_path / "out"
    code, _, said = call(capsys, "fuse", runs[0], tmp_path / "strange", "--out", out)
    assert (code, "shares no image with" in said) == (2, True)
    code, _, said = call(capsys, "fuse", runs[0], tmp_path / "cars", "--out", out)
    assert (code, "classes that the first run lacks: car" in said) == (2, True)
    assert "Traceback" not in said
    assert call(capsys, "fuse", *runs, "--out", out, "--map", "car")[0] == 2
    assert not (out / "run.json").exists()
    code, _, said = call(capsys, "compare", runs[0], tmp_path / "cars")
    assert (code, "no class in common" in said) == (2, True)

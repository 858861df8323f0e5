"""Graphs that cannot be used, as a user meets them: one line, an exit code, and no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import TensorProto

from pipelines.cli.main import main
from tests.support.samples.family_graphs import write_graph
from tests.support.samples.tiny_run import fill_folder

BOXES = np.full((12, 4), 0.2, np.float32)
TWO = {"dets": BOXES, "labels": np.zeros((12, 3), np.float32)}
NAN = {**TWO, "dets": np.where(np.arange(4) == 1, np.nan, BOXES).astype(np.float32)}


@pytest.mark.parametrize(
    ("outputs", "graph", "model", "code", "said"),
    [
        ({"dets": BOXES}, {}, {}, 2, "has 2 outputs, and bad.onnx has 1"),
        ({**TWO, "masks": BOXES}, {}, {}, 2, "has 2 outputs, and bad.onnx has 3"),
        (TWO, {}, {"classes": ["cat"]}, 2, "has 1 names, and bad.onnx has 3 class columns"),
        (TWO, {"kind": TensorProto.INT64}, {}, 1, "takes images as tensor(int64)"),
        (TWO, {"size": ("h", "w")}, {}, 2, "takes images of any size"),
        pytest.param(NAN, {}, {}, 1, "output is not finite", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_refused_in_one_line_before_it_exists(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    outputs: dict[str, Any],
    graph: dict[str, Any],
    model: dict[str, Any],
    code: int,
    said: str,
) -> None:
    monkeypatch.setenv("LABELFLEET_CACHE", str(tmp_path / "cache"))
    fill_folder(tmp_path / "images", 2)
    write_graph(tmp_path / "bad.onnx", outputs, **graph)
    fields = {
        "name": "bad", "source": {"url": str(tmp_path / "images")}, "output": str(tmp_path / "out"),
        "model": {
            "checkpoint": str(tmp_path / "bad.onnx"), "family": "rf-detr", "runtime": "onnx",
            "classes": ["cat", "dog", "owl"], **model,
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(SystemExit) as left:
        main(["run", str(tmp_path / "run.yaml")])
    error = capsys.readouterr().err
    assert left.value.code == code, error
    assert said in next(line for line in error.splitlines() if line.startswith("error: "))
    assert "Traceback" not in error
    assert not (tmp_path / "out/run.json").exists()

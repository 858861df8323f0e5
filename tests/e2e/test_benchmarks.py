"""The benchmarks run as documented, in small, and say what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import patient

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(name: str, out: Path, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=patient(250)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / f"{name}.json").read_text())
    assert isinstance(found, dict)
    return found


def test_the_free_detector_against_the_bare_decode_loop(tmp_path: Path) -> None:
    found = run("efficiency", tmp_path, "--variants", "free", "--images", "2", "--rounds", "2")
    assert found["unit"] == "images/s"
    ratios = found["ratios"]
    assert isinstance(ratios, dict)
    assert len(ratios) == 2  # by the clock and in CPU time
    assert all(0 < r["low"] <= r["median"] <= r["high"] for r in ratios.values())
    assert ratios["free detector ÷ bare decode loop"]["wanted"] == 0.8
    values = found["values"]
    assert isinstance(values, dict)
    assert [len(row) for row in values.values()] == [2, 2]
    assert (tmp_path / "efficiency.png").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(found)

"""The GPU day's command line, and what of it a machine without a GPU can run."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_day import BUDGET_S, ON_CPU, ON_GPU, install_wheels, main, picked, steps

ROOT = Path(__file__).parents[2]


def test_all_steps_fit_the_budget_even_if_each_takes_its_limit(tmp_path: Path) -> None:
    for scale in (ON_GPU, ON_CPU):
        found = steps(scale, tmp_path, tmp_path)
        spare_s = 20  # the card is asked, and processes that hang are ended
        assert sum(step.limit_s for step in found) + spare_s <= BUDGET_S * scale.patience
        assert len({step.name for step in found}) == len(found)


def test_each_step_is_a_command_that_exists(tmp_path: Path) -> None:
    for step in steps(ON_GPU, tmp_path, tmp_path):
        if step.command[1] == "-m" and step.command[2].startswith("benchmarks."):
            assert (ROOT / step.command[2].replace(".", "/")).with_suffix(".py").exists()
        files = [part for part in step.command if part.endswith(".py")]
        assert all(Path(part).exists() for part in files)


def test_what_needs_a_gpu_is_left_out_on_cpus(tmp_path: Path) -> None:
    unable = {step.name for step in steps(ON_CPU, tmp_path, None) if step.unable == "needs a GPU"}
    assert unable == {"cuda-tests", "tensorrt-tests", "tensorrt-accuracy", "tensorrt-efficiency"}


def test_dry_run_lists_the_steps(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [step.name for step in steps(ON_GPU, tmp_path, None)]
    assert not (tmp_path / "out").exists()


def test_an_unknown_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        picked(steps(ON_GPU, tmp_path, None), "jpeg,nvjpeg")
    assert left.value.code == 2
    assert "no step nvjpeg; there are cuda-tests, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--out", str(tmp_path / "out")])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "gpu_day: torch sees no NVIDIA GPU here; --cpu tests this script without one"
    ]


@pytest.mark.slow
def test_carried_wheels_are_installed_beside_the_steps(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried-1.0.dist-info"
        wheel.writestr("carried.py", "HERE = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n"
                                           "Requires-Dist: not-to-be-fetched\n")  # fmt: skip
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                                        "Tag: py3-none-any\n")  # fmt: skip
        wheel.writestr(f"{info}/RECORD", "")
    install_wheels(tmp_path, tmp_path / "target")
    assert (tmp_path / "target" / "carried.py").exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        install_wheels(tmp_path, tmp_path / "target")
    assert left.value.code == 2


@pytest.mark.slow
def test_steps_without_a_gpu_run_and_are_recorded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "training-data,jpeg,cuda-tests"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert found["facts"]["torch"] == torch.__version__
    assert found["facts"]["commit"]
    tests, data, jpeg = found["steps"]
    assert (tests["status"], data["status"], jpeg["status"]) == ("skipped", "passed", "passed")
    assert jpeg["figures"]["simplejpeg, 1 threads, images/s"] > 0
    assert (tmp_path / "training" / "train.json").exists()

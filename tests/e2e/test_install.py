"""Installed like any package: a wheel in an empty environment, pip, and uv as a tool."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.support.patience import patient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests/support/old_runs/v0.1.0.tar.gz"
UV = ROOT / ".venv/bin/uv"
LONG = pytest.mark.skipif(
    not os.environ.get("LABELFLEET_LONG"), reason="downloads 5 GB: `make installs` runs it"
)


def ran(*command: object, folder: Path, timeout_s: float = 1500) -> str:
    """Run a command in ``folder`` with nothing of this checkout in reach; its stdout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=folder, env=env, capture_output=True, text=True, timeout=patient(timeout_s),
    )  # fmt: skip
    assert ended.returncode == 0, f"{command}: {ended.stdout[-1500:]}{ended.stderr[-3000:]}"
    return ended.stdout


def emptied(folder: Path) -> Path:
    """The Python of a new virtual environment with pip and nothing else."""
    ran(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    return folder / "venv/bin/python"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built of: building leaves its folders beside the sources."""
    place = tmp_path_factory.mktemp("sources")
    for room in ("pipelines", "workers", "storage"):
        shutil.copytree(ROOT / room, place / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place / name)
    return place


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    ran(UV, "build", "--quiet", "--wheel", "--out-dir", place, sources, folder=place)
    (built,) = place.glob("*.whl")
    return built


def test_a_wheel_in_an_empty_environment_reads_decides_and_exports(
    wheel: Path, tmp_path: Path
) -> None:
    python = emptied(tmp_path)
    # uv shares this project's download cache; that pip resolves the same set is tested below.
    ran(UV, "pip", "install", "--quiet", "--no-config", "--python", python, wheel, folder=tmp_path)
    installed = ran(UV, "pip", "list", "--python", python, folder=tmp_path)
    assert not {"torch", "ray", "super-gradients"} & set(installed.split())
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    command = python.parent / "labelfleet"
    assert ran(command, "--version", folder=tmp_path).startswith("labelfleet ")
    assert "8" in ran(command, "status", "old", folder=tmp_path)
    ran(command, "decide", "old", "--alone", folder=tmp_path)
    ran(command, "export", "old", "coco", "--format", "coco", folder=tmp_path)
    assert len(json.loads((tmp_path / "coco/annotations.json").read_text())["images"]) == 8
    every_command_works_or_names_its_extra(command, tmp_path)


# What a command is tried with in an installation without extras: "" needs none, else the package
# that it lacks first. Those that need a server or another run are as far as they come without.
TRIED = {
    "run": ("run.yaml", "ray"), "plan": ("run.yaml", "torch"), "gate": ("run.yaml", "ray"),
    "compile": ("run.yaml", "torch"), "demo": ("demo", "ray"), "train": ("train.yaml", "torch"),
    "round": ("round.yaml", "torch"), "suite": ("suite.yaml", "ray"), "card": ("old", "torch"),
    "browse": ("old", "uvicorn"), "status": ("old", ""), "doctor": ("", ""),
    "report": ("old", ""), "ingest": ("images out", ""), "init": ("images", ""),
    "schema": ("run", ""), "diff": ("old v0001 latest", ""), "gc": ("old", ""),
    "evaluate": ("old --truth coco/annotations.json --allow-missing", ""),
    "fit": ("old --truth coco/annotations.json --allow-missing --force", ""),
    "decide": ("old --alone", ""), "compare": ("old old", ""),
    "export": ("old yolo --format yolo", ""), "review": ("status old", ""),
}  # fmt: skip
REFUSED = {"verify", "relocate", "fuse", "submit"}  # for reasons of their own, as they are given


def every_command_works_or_names_its_extra(command: Path, folder: Path) -> None:
    """Run each command in ``folder``, and compare what it lacks with what the doctor says."""
    (folder / "run.yaml").write_text(
        "{name: x, source: {url: images}, output: o, model: {checkpoint: none.pth}}"
    )
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images/a.png")
    data = "{annotations: coco/annotations.json, images: images}"
    (folder / "train.yaml").write_text(
        f"{{name: x, output: t, train: {data}, val: {data}, steps: 1}}"
    )
    (folder / "round.yaml").write_text(
        f"{{name: x, output: r, pool: {{url: images}}, truth: {data}, test: {data}, "
        "teacher: {checkpoint: run.yaml}}"
    )
    (folder / "suite.yaml").write_text(
        "{name: x, output: s, model: {checkpoint: none.pth}, "
        "sets: [{name: y, images: images, test: coco/annotations.json}]}"
    )
    told = json.loads(ran(command, "doctor", "--json", folder=folder).splitlines()[-1])
    findings = {one["subject"]: one for one in told["findings"]}
    listed = ran(command, "--help", folder=folder).partition("Commands:")[2]
    commands = set(re.findall(r"^  ([a-z]+)  ", listed, re.MULTILINE))
    assert commands == TRIED.keys() | REFUSED
    for name, (arguments, lacking) in TRIED.items():
        ended = subprocess.run(
            [str(command), name, *arguments.split()], cwd=folder, capture_output=True, text=True
        )
        said = f"{name} {arguments}: {ended.stderr}"
        if not lacking:
            assert ended.returncode == 0, said
            continue
        assert ended.returncode == 1, said
        assert f"needs {lacking}, which is not installed" in ended.stderr, said
        advice = findings[lacking]["advice"]
        assert advice, lacking
        assert advice in ended.stderr, said
        assert re.search(rf"\b{name}\b", findings[lacking]["found"]), findings[lacking]
    for arguments in (
        ["status", "gs://bucket/run"],
        ["export", "old", "az://a", "--format", "hf"],
    ):
        ended = subprocess.run(
            [str(command), *arguments], cwd=folder, capture_output=True, text=True
        )
        assert "pip install 'labelfleet[clouds]'" in ended.stderr, ended.stderr


@LONG
@pytest.mark.parametrize("extras", ["", "[openvino,train,review]"])
def test_pip_installs_it(extras: str, sources: Path, tmp_path: Path) -> None:
    python = emptied(tmp_path)
    ran(python, "-m", "pip", "install", "--quiet", f"labelfleet{extras} @ {sources.as_uri()}",
        folder=tmp_path)  # fmt: skip
    command = python.parent / "labelfleet"
    if not extras:
        assert "labelfleet" in ran(command, "--version", folder=tmp_path)
        return
    ran(python, "-m", "pip", "install", "--quiet", "--no-deps",
        "-r", ROOT / "requirements/super-gradients.txt", folder=tmp_path)  # fmt: skip
    ran(command, "demo", "demo", folder=tmp_path)


@LONG
def test_uv_installs_it_as_a_tool(wheel: Path, tmp_path: Path) -> None:
    env = {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(tmp_path / "bin")}
    ran("env", *(f"{k}={v}" for k, v in env.items()), UV, "tool", "install", "--quiet",
        f"labelfleet[run] @ {wheel.as_uri()}", folder=tmp_path)  # fmt: skip
    assert "labelfleet" in ran(tmp_path / "bin/labelfleet", "--version", folder=tmp_path)


@LONG
def test_the_lock_installs_with_pip_alone(wheel: Path, tmp_path: Path) -> None:
    python = emptied(tmp_path)
    ran(python, "-m", "pip", "install", "--quiet", "--no-deps",
        "-r", ROOT / "requirements/full.txt", wheel, folder=tmp_path)  # fmt: skip
    ran(python.parent / "labelfleet", "demo", "demo", folder=tmp_path)

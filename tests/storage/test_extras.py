"""The core works without the packages of the extras, and a command that lacks one says which."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from storage.errors import NotInstalled
from storage.extras import EXTRA_OF, not_installed

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests/support/old_runs/v0.1.0.tar.gz"

# Runs commands one after the other in a process where the extras' packages are not to be had.
WITHOUT = """
import importlib.abc, json, sys
lacking = set(json.loads(sys.argv[1]))

class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in lacking:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
from pipelines.cli.main import app
for command in json.loads(sys.argv[2]):
    code = app(command, standalone_mode=False)
    assert not code or code == 1 and command[0] == "verify", (command, code)
loaded = lacking & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""


@pytest.mark.slow
def test_reading_deciding_evaluating_and_exporting_need_no_extra(tmp_path: Path) -> None:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    run, coco = str(tmp_path / "old"), str(tmp_path / "coco")
    commands = [
        ["status", run],
        ["verify", run],
        ["report", run],
        ["decide", run, "--alone"],
        ["export", run, coco, "--format", "coco"],
        ["evaluate", run, "--truth", f"{coco}/annotations.json", "--allow-missing"],
        ["diff", run, "v0001", "v0002"],
        ["review", "route", run, "--budget", "2 images"],
    ]
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(sorted(EXTRA_OF)), json.dumps(commands)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("torch.nn", "labelfleet[run]"),
        ("label_studio_sdk.converter", "labelfleet[review]"),
        ("super_gradients", "--no-deps super-gradients==3.7.1"),
    ],
)
def test_what_is_missing_names_its_extra(module: str, said: str) -> None:
    found = not_installed(ModuleNotFoundError(name=module))
    assert isinstance(found, NotInstalled)
    assert said in str(found.hint)


def test_a_missing_package_of_the_core_is_not_an_extra() -> None:
    assert not_installed(ModuleNotFoundError(name="pyarrow")) is None
    assert not_installed(ModuleNotFoundError()) is None

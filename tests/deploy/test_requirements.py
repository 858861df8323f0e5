"""The locks in requirements/ are of pyproject.toml as it is, and name no index and no path."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {
    "core": (), "run": ("run",), "full": ("run", "train", "super-gradients", "review", "openvino"),
}  # fmt: skip


def locked(name: str) -> dict[str, list[str]]:
    """Versions by package; one has several where they differ by platform."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines():
        requirement = Requirement(line)
        [pin] = requirement.specifier
        assert pin.operator == "==", line
        found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_pyproject_asks_for(name: str) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(d for e in LOCKS[name] for d in extras[e])]
    found = locked(name)
    for requirement in map(Requirement, asked):
        if requirement.name == "labelfleet":
            continue
        versions = found[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(v) for v in versions), requirement


@pytest.mark.parametrize("name", [*LOCKS, "super-gradients"])
def test_a_lock_names_no_place(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text()
    assert not re.search(r"https?://|file:|--|^/|@", text, re.MULTILINE)


def test_the_hint_for_super_gradients_has_the_locked_versions() -> None:
    from storage.extras import not_installed

    missing = not_installed(ModuleNotFoundError(name="super_gradients"))
    assert missing is not None
    lines = (ROOT / "requirements/super-gradients.txt").read_text().split()
    assert all(line in str(missing.hint) for line in lines)

"""docs/reliability.md: every fault it lists has a test, and every fault that must be there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "tests/" in line]
MUST = (
    "SIGKILL", "SIGSTOP", "SIGSEGV", "out of memory", "node is lost", "node drains", "joins late",
    "spot notice", "driver is killed", "raylet", "head (GCS)", "two drivers", "503 SlowDown",
    "in time", "resets", "cuts", "stale", "full", "credentials", "poison", "clock jumps",
)  # fmt: skip


def names_in(path: Path) -> set[str]:
    """Names as pytest has them: ``test_x`` and ``Class::test_x``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_row_names_a_test_that_is_there(row: str) -> None:
    fault, _, shown_by = (cell.strip() for cell in row.strip("|").split("|"))
    path, _, name = re.fullmatch(r"`(tests/[\w/]+\.py)(::)([\w:]+)`", shown_by).groups()  # type: ignore[union-attr]
    assert name in names_in(ROOT / path), fault


def test_every_fault_that_was_asked_for_has_its_row() -> None:
    faults = " ".join(row.split("|")[1] for row in ROWS)
    assert [fault for fault in MUST if fault not in faults] == []

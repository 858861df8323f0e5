"""SECURITY.md names a test for each promise; every one of them must be there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@functools.cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_a_named_test_exists(path: str, name: str) -> None:
    assert name in functions_of(path)


def test_every_promise_names_one() -> None:
    rows = PAGE.partition("## Promises")[2].partition("\n## ")[0].splitlines()
    promises = [row for row in rows if row.startswith("| ") and not row.startswith("| promise")]
    assert len(promises) >= 18
    assert [row for row in promises if not re.search(r"`tests/\S+::test_\w+`", row)] == []


def test_every_file_it_speaks_of_exists() -> None:
    for path in re.findall(r"`((?:pipelines|tests|docs|workers|storage)/[\w/]+\.(?:py|md))`", PAGE):
        assert (ROOT / path).is_file(), path

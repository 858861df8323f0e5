"""One table says what `run` exits with; the docs show the same table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.labelling.exit_codes import RULES, exit_code
from pipelines.labelling.summary import RunSummary

DOCS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


def summary(**changes: Any) -> RunSummary:
    whole: dict[str, Any] = {
        "images": 100, "ok": 100, "undecodable": 0, "too_large": 0, "unsupported": 0, "missing": 0,
        "not_finite": 0,
        "detections": 9, "shards": 10, "left": 0, "quarantined": 0, "new_images": 100,
        "new_shards": 10, "seconds": 1.0, "images_per_s": 100.0, "output": "file:///run",
        "outcome": "done",
    }  # fmt: skip
    return RunSummary(**{**whole, **changes})


@pytest.mark.parametrize(
    ("changes", "code", "strict"),
    [
        ({}, 0, 0),
        ({"images": 0, "ok": 0}, 0, 0),
        ({"outcome": "stopped", "left": 4}, 130, 130),
        ({"quarantined": 1}, 3, 3),
        ({"ok": 89, "undecodable": 11, "max_bad_share": 0.1}, 3, 3),
        ({"ok": 90, "undecodable": 10, "max_bad_share": 0.1}, 0, 3),
        ({"ok": 0, "undecodable": 100}, 3, 3),
        ({"truncated": ["a.tar: ended in the middle"]}, 3, 3),
        ({"left": 4}, 0, 3),
        ({"ok": 99, "undecodable": 1}, 0, 3),
        ({"ok": 99, "missing": 1}, 0, 3),
    ],
)
def test_what_was_left_out_decides(changes: dict[str, Any], code: int, strict: int) -> None:
    assert exit_code(summary(**changes)) == code
    assert exit_code(summary(**changes), strict=True) == strict


def test_the_docs_show_the_table() -> None:
    shown = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \|$", DOCS.read_text(), re.MULTILINE)
    assert shown == [(rule.what, str(rule.code), str(rule.strict)) for rule in RULES]

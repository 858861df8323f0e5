"""What people see of an export."""

from __future__ import annotations

import io

from rich.console import Console

from pipelines.exports.export import ExportSummary
from pipelines.exports.view import export_table


def shown(summary: ExportSummary) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(export_table(summary))
    return out.getvalue()


def test_zeros_and_what_does_not_apply_are_left_out() -> None:
    text = shown(ExportSummary("/data/out", "coco", "v0001", 1200, 0, 3456, 0, 0))
    assert "coco of labels v0001" in text
    assert "1,200" in text
    assert "3,456" in text
    assert "/data/out" in text
    for word in ("None", "first problem", "turned", "earlier", "left out", "ignore", "without"):
        assert word not in text


def test_what_went_wrong_is_shown() -> None:
    text = shown(ExportSummary("/o", "hf", "v0002", 10, 1, 9, 2, 3, "'a[red].jpg': gone", 4, 5))
    rows = {
        cells[1].strip(): cells[2].strip()
        for line in text.splitlines()
        if len(cells := line.split("│")) == 4
    }
    assert rows == {
        "images": "10",
        "labels": "9",
        "images without a label": "1",
        "ignore boxes": "2",
        "turned upright": "4",
        "copied by an earlier attempt": "5",
        "images left out": "3",
        "first problem": "'a[red].jpg': gone",
        "written to": "/o",
    }

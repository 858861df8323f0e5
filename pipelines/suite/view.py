"""Display a suite: a table for people, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.suite.result import Mean, SetResult, SuiteSummary

_COLUMNS = ("data set", "domain", "images", "classes", "mAP@0.5", "mAP@0.5:0.95", "note")


def suite_table(summary: SuiteSummary) -> RenderableType:
    """Render the result for people."""
    table = Table(title=f"{summary.name}: {len(summary.sets)} data sets", title_justify="left")
    for column in _COLUMNS:
        left = column in ("data set", "domain", "note")
        table.add_column(column, justify="left" if left else "right")
    for cells in _rows(summary):
        table.add_row(*(Text(cell) for cell in cells))
    return Group(table, Text(f"in {summary.output}: suite.md, suite.json, and a folder each"))


def markdown(summary: SuiteSummary) -> str:
    """Return the table as a Markdown page."""
    lines = [
        f"# {summary.name}",
        "",
        "Means count each data set once. mAP as in COCO, on the test split.",
        "",
        _line(_COLUMNS),
        _line(["---"] * 2 + ["---:"] * 4 + ["---"]),
        *(_line(cells) for cells in _rows(summary)),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rows(summary: SuiteSummary) -> Iterator[list[str]]:
    for one in summary.sets:
        yield _set_row(one)
    for mean in summary.domains:
        yield _mean_row(f"mean of {mean.name}", mean)
    if summary.mean is not None:
        yield _mean_row("mean", summary.mean)


def _set_row(one: SetResult) -> list[str]:
    if one.error:
        return [one.name, one.domain, "", "", "", "", f"failed: {one.error}"]
    figures = [_figure(one.map50), _figure(one.map_)]
    return [one.name, one.domain, f"{one.images:,}", f"{one.classes}", *figures, one.remark]


def _mean_row(name: str, mean: Mean) -> list[str]:
    sets = "1 data set" if mean.sets == 1 else f"{mean.sets} data sets"
    return [name, "", "", "", _figure(mean.map50), _figure(mean.map_), sets]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

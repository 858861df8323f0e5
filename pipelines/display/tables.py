"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MOST_NAMED = 10  # images named one by one


def summary_table(title: str, rows: Sequence[tuple[str, str]]) -> RenderableType:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, Text(value))  # brackets in a URL or file name are not markup
    return Group(Text(title, style="bold"), table)

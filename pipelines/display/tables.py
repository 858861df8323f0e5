"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
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


def figures_table(title: str, named: str, headings: Sequence[str]) -> Table:
    """Return a table with a name and figures in each row, for terminals from 80 columns up.

    Only names wrap: a figure or heading is never cut. Without rules between the columns, seven
    figures and a name of 20 characters fit into 80 columns.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column(named, overflow="fold", min_width=10, vertical="bottom")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    return table

"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

MOST_NAMED = 10  # images named one by one
_NAME_WIDTH = 10


def summary_table(title: str, rows: Sequence[tuple[str, str]]) -> RenderableType:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, Text(value))  # brackets in a URL or file name are not markup
    return Group(Text(title, style="bold"), table)


class _Figures(Table):
    """Folds its figures as well where the terminal is too narrow for them: none is cut."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name, *figures = self.columns
        for column in figures:
            column.no_wrap = True
        name.min_width = _NAME_WIDTH
        if self.__rich_measure__(console, options).minimum > options.max_width:
            for column in figures:
                column.no_wrap = False
            name.min_width = None
        yield from super().__rich_console__(console, options)


def figures_table(title: str, named: str, headings: Sequence[str]) -> Table:
    """Return a table with a name and figures in each row, for terminals from 80 columns up.

    Only names wrap, figures on narrower terminals alone: a figure or heading is never cut. Without
    rules between the columns, seven figures and a name of 20 characters fit into 80 columns.
    """
    table = _Figures(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column(named, overflow="fold", vertical="bottom")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, overflow="fold", vertical="bottom")
    return table

"""A round on the terminal: its steps, its result, and where the page is."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.console import unbroken
from pipelines.display.durations import shown_duration
from pipelines.rounds.round import RoundSummary


def round_table(summary: RoundSummary) -> RenderableType:
    """Render where a round stands."""
    table = Table("step", "state", "time", box=None)
    for one in summary.steps:
        time = shown_duration(one.seconds) if one.seconds else ""
        state = f"{one.status}: {one.reason}" if one.reason else one.status
        table.add_row(one.step, Text(state, overflow="fold"), time)
    for step in summary.left:
        if step not in {one.step for one in summary.steps}:
            table.add_row(step, Text("to do", "dim"), "")
    lines = [Text(summary.verdict, "bold")] if summary.verdict else []
    costs = summary.costs
    spent = f"{shown_duration(3600 * costs.machine_hours)} of machines"
    spent += f", {costs.gpu_hours:.2f} GPU hours" if costs.gpu_hours else ""
    spent += f", {costs.human_minutes:.0f} minutes of people" if costs.human_minutes else ""
    lines.append(Text(spent))
    if summary.page:
        lines.append(unbroken(f"page: {summary.page}"))
    return Group(table, Text(), *lines)

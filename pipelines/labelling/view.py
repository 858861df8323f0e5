"""A run's plan and its summary, rendered for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.console import unbroken
from pipelines.display.plural import counted
from pipelines.display.tables import MOST_NAMED
from pipelines.labelling.plan import Plan
from storage.records import STATUSES
from storage.shards.selecting import shown_counts
from storage.urls import shown_url

if TYPE_CHECKING:  # what ran needs Ray, a plan does not
    from pipelines.labelling.summary import RunSummary


def run_table(summary: RunSummary) -> RenderableType:
    """Render the final table, and below it what needs attention."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("images", f"{summary.images:,}")
    for status in STATUSES:
        count: int = getattr(summary, status)
        if status == "ok" or count:
            table.add_row(f"  {status}", f"{count:,}", style=None if status == "ok" else "yellow")
    table.add_row("detections", f"{summary.detections:,}")
    table.add_row("shards committed", f"{summary.shards:,}")
    if summary.left:
        table.add_row("shards left", f"{summary.left:,}")
    if summary.quarantined:
        table.add_row("shards quarantined", f"{summary.quarantined:,}", style="red")
    if summary.new_images:
        table.add_row(
            "this time", f"{counted(summary.new_images, 'image')} in {summary.seconds:.1f} s"
        )
        table.add_row("", f"{summary.startup_s:.1f} s of them start-up")
        table.add_row("", f"then {summary.images_per_s:.1f} images/s")
    elif summary.outcome == "done" and not summary.left:
        table.add_row("this time", f"nothing to do ({summary.seconds:.1f} s)")
    else:
        table.add_row("this time", f"no images in {summary.seconds:.1f} s")
    return Group(Text(summary.output, "bold"), table, *_remarks(summary))


def _remarks(summary: RunSummary) -> list[Text]:
    cut = summary.truncated
    remarks = [Text(f"truncated: {said}", style="yellow") for said in cut[:MOST_NAMED]]
    if len(cut) > MOST_NAMED:
        remarks.append(Text(f"… and {len(cut) - MOST_NAMED} more tars", style="yellow"))
    if summary.quarantined:
        remarks.append(
            Text(
                f"{counted(summary.quarantined, 'shard')} failed every attempt; the reasons are "
                f"below {summary.output}/quarantine/. The next run tries each once more.",
                style="red",
            )
        )
    if summary.drift:
        remarks.append(Text(f"Drift: later images {summary.drift}", style="yellow"))
    if summary.left_out:
        remarks.append(Text(f"left out of the source: {shown_counts(summary.left_out)}"))
    if summary.outcome == "stopped":
        remarks.append(Text("Stopped with work left; run the same command to continue."))
    if summary.routed:
        remarks.append(
            unbroken(
                f"routed: {counted(summary.routed, 'image')}; next: "
                + shlex.join(["labelfleet", "review", "push", summary.output])
            )
        )
    return remarks


def _second(plan: Plan) -> str:
    """Say what a second opinion costs; a view's cost grows with the pixels of its input."""
    cost = "" if plan.cost_second is None else f" and costs {plan.cost_second:.2f}"
    return (
        f"a second run over all images takes {plan.hours_second:.2f} hours{cost} at this pace; a "
        "`model.view` with a scale of 0.75 about half of it where the network is what takes time"
    )


def _beside(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what is to be known beside the figures: a word on what it is about, and a sentence."""
    yield "output", f"{plan.output} ({'exists' if plan.output_exists else 'new'})"
    if plan.hours_left is None:
        yield from (("at least", line) for line in plan.published)
        yield (
            "hours",
            "unknown until this run was measured; try `run --limit 2`, then plan, or "
            "`plan --like RUN` with a run that was",
        )
    else:
        whose = "" if plan.like is None else f" in {shown_url(plan.like)}"
        yield (
            "pace",
            f"{plan.images_per_s:.1f} images/s, as measured{whose} with "
            f"{plan.measured_workers} worker{'s' * (plan.measured_workers != 1)} once ready; more "
            "of them take less time",
        )
        yield "for `fuse`", _second(plan)
    if plan.missing is None:
        yield "missing", "unknown: some results cannot be read; `labelfleet verify` says which"
    elif plan.missing:
        yield (
            "missing",
            f"{counted(plan.missing, 'image')} that could not be read before; `run` looks again, "
            "and labels what can be read by then",
        )
    for why in plan.unreadable:
        yield "unreadable", f"{why}; the run puts what it cannot read in quarantine"
    if plan.left_out:
        yield "left out", f"of the source: {shown_counts(plan.left_out)}"
    yield from (("model", remark) for remark in plan.model_remarks)


def plan_table(plan: Plan) -> RenderableType:
    """Render the result for people."""
    table = Table(title="Plan", title_justify="left")
    for column in ("", "in the source", "left to do"):
        table.add_column(column, justify="left" if not column else "right")
    about = "" if plan.images_exact else "~"
    table.add_row("shards", f"{plan.shards:,}", f"{plan.shards_left:,}")
    table.add_row("images", f"{about}{plan.images:,}", f"{about}{plan.images_left:,}")
    table.add_row("GiB", f"{plan.gib:.2f}", f"{plan.gib_left:.2f}")
    table.add_row("hours", "", "?" if plan.hours_left is None else f"{plan.hours_left:.2f}")
    table.add_row("cost", "", "?" if plan.cost_left is None else f"{plan.cost_left:.2f}")
    beside = Table(show_header=False, box=None, pad_edge=False)
    beside.add_column(style="bold", no_wrap=True, vertical="top")
    beside.add_column(overflow="fold")
    before = ""
    for about_what, said in _beside(plan):
        beside.add_row("" if about_what == before else about_what, Text(said))
        before = about_what
    return Group(table, beside)

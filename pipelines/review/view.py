"""Display a review: bars while it runs, tables at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.display.console import unbroken
from pipelines.display.plural import counted
from pipelines.display.progress_bar import ProgressBar, progress_bar
from pipelines.display.tables import MOST_NAMED, summary_table
from pipelines.evaluation.annotators import PeopleReport
from pipelines.evaluation.audit import AuditReport
from pipelines.evaluation.intervals import Estimate, plain
from pipelines.review.pull import PullSummary
from pipelines.review.push import PushSummary, PushWatcher
from pipelines.review.refresh import RefreshSummary
from pipelines.review.status import ReviewStatus
from pipelines.review.withdrawals import DECIDE, RetractSummary
from pipelines.routing.route import RouteSummary


class _Watcher(PushWatcher):
    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._name, self._done, self._total = "", 0, 0

    def stage(self, name: str, total: int) -> None:
        self._name, self._done, self._total = name, 0, total
        self.advance(0)

    def advance(self, count: int) -> None:
        self._done += count
        self._bar.update(self._done, self._total, self._name)


@contextmanager
def push_progress() -> Iterator[PushWatcher]:
    """Yield a watcher that shows each stage of a push."""
    with progress_bar("pushing", "images") as bar:
        yield _Watcher(bar)


def render_route(summary: RouteSummary) -> RenderableType:
    """Render what was drawn, and what was passed over."""
    if summary.repeated:
        return Text("This invocation was already routed; nothing was done.")
    rows = [
        ("drawn by value", f"{summary.value:,}"),
        ("drawn at random (audit)", f"{summary.audit:,}"),
        ("human minutes expected", f"{summary.minutes:,.0f}"),
    ]
    if summary.gold:
        rows.insert(2, ("with known boxes (gold)", f"{summary.gold:,}"))
    if summary.audit_known:
        rows.append(("audit images in the queue already", f"{summary.audit_known:,}"))
    rows += [(f"not routed: {why}", f"{n:,}") for why, n in sorted(summary.passed_over.items())]
    return Group(summary_table("routed", rows), Text(f"queue: {summary.key}"))


def render_push(summary: PushSummary) -> RenderableType:
    """Render what is there now, and what could not be shown."""
    rows = [("queued", f"{summary.queued:,}"), ("pushed now", f"{summary.created:,}")]
    if summary.there:
        rows.append(("there already", f"{summary.there:,}"))
    if summary.answered_before:
        rows.append(("answered before, not pushed again", f"{summary.answered_before:,}"))
    if summary.kept_shown:
        rows.append(("other tasks that keep their boxes", f"{summary.kept_shown:,}"))
    if summary.predicted:
        rows.append(("new boxes for open tasks", f"{summary.predicted:,}"))
    if summary.lost_replies:
        rows.append(("lost replies looked up", f"{summary.lost_replies:,}"))
    if summary.twins_deleted:
        rows.append(("doubled tasks deleted", f"{summary.twins_deleted:,}"))
    remarks = [
        Text(f"not shown: {image_id}: {why}", style="yellow")
        for image_id, why in list(summary.not_shown.items())[:MOST_NAMED]
    ]
    if len(summary.not_shown) > MOST_NAMED:
        remarks.append(Text(f"… and {len(summary.not_shown) - MOST_NAMED} more", style="yellow"))
    return Group(
        summary_table(summary.project, rows), *remarks, unbroken(f"review at {summary.url}")
    )


def render_refresh(summary: RefreshSummary) -> RenderableType:
    """Render what became of open tasks."""
    rows = [("open tasks", f"{summary.open:,}"), ("  with other boxes", f"{summary.predicted:,}"),
            ("  ranked anew", f"{summary.ranked:,}"),
            ("closed, no longer pay", f"{summary.closed:,}")]  # fmt: skip
    remarks = []
    if summary.reopened:
        remarks.append(f"{summary.reopened} closed images are worth reviewing again: push them")
    return Group(summary_table("refreshed", rows), *(Text(r, style="yellow") for r in remarks))


def render_retract(summary: RetractSummary) -> RenderableType:
    """Render what was withdrawn by hand."""
    rows = [("answers", f"{summary.answers:,}"), ("  images", f"{summary.images:,}"),
            ("  people", f"{summary.people:,}"),
            ("tasks opened again", f"{summary.deleted_there:,}")]  # fmt: skip
    remarks = []
    if summary.not_reopened:
        remarks.append(f"unchanged in Label Studio: {counted(summary.not_reopened, 'answer')}")
    return Group(summary_table("retracted", rows), *(Text(r, style="yellow") for r in remarks))


def render_pull(summary: PullSummary) -> RenderableType:
    """Render what came back."""
    rows = [("answers, new or edited", f"{summary.answers:,}")]
    for name in ("skipped", "images", "people", "kept", "moved", "relabelled", "added", "deleted"):
        rows.append((f"  {name}", f"{getattr(summary, name):,}"))
    remarks = []
    if summary.withdrawn:
        rows.append(("withdrawn: deleted there since", f"{summary.withdrawn:,}"))
    if summary.kept_on:
        rows.append(("deleted there, still counted (--keep-answers)", f"{summary.kept_on:,}"))
    if summary.held_back:
        remarks.append(
            f"{summary.held_back} answers, most of all there were, are gone from the project; they "
            f"still count. {DECIDE.capitalize()}"
        )
    for title, answers in summary.deleted_projects.items():
        remarks.append(
            f"the project {title!r} was deleted; {counted(answers, 'answer')} from it still count. "
            f"{DECIDE.capitalize()}"
        )
    if summary.unusable:
        remarks.append(
            f"{counted(summary.unusable, 'answer')} cannot become boxes, which settles nothing:"
        )
        remarks += [f"  {address}" for address in summary.set_aside[:MOST_NAMED]]
        if summary.unusable > MOST_NAMED:
            remarks.append(f"  … and {summary.unusable - MOST_NAMED} more")
    if summary.unknown:
        remarks.append(f"{summary.unknown} annotations are of images that this run never queued")
    if summary.unreadable:
        remarks.append(f"{summary.unreadable} annotations cannot be read and were left out")
    if summary.twins_deleted:
        remarks.append(f"{summary.twins_deleted} duplicated tasks were deleted")
    return Group(summary_table("pulled", rows), *(Text(r, style="yellow") for r in remarks))


def render_status(status: ReviewStatus) -> RenderableType:
    """Render the progress of review, and what it was worth below."""
    noun = "person" if status.people == 1 else "people"
    pushed = "?" if status.pushed is None else f"{status.pushed:,}"
    rows = [
        ("queued", f"{status.queued:,}, {status.audit:,} of them at random"),
        ("pushed", pushed),
        ("answered", f"{status.answered:,} by {status.people:,} {noun}"),
    ]
    if status.skipped:
        rows.append(("skipped", f"{status.skipped:,}"))
    if status.waiting:
        rows.append(("begun, or not pulled yet", f"{status.waiting:,}"))
    minutes = f"{status.minutes_left:,.0f} of {status.minutes * status.pace:,.0f}"
    learned = "" if status.pace == 1.0 else ", at the pace of the answers so far"
    rows.append(("minutes left", minutes + learned))
    if status.last_answer:
        rows.append(("last answer", f"{status.last_answer:%Y-%m-%d %H:%M} UTC"))
    parts: list[RenderableType] = [summary_table(f"{status.project} at {status.url}", rows)]
    if status.problem:
        parts.append(Text(status.problem, style="yellow"))
    if status.figures is not None:
        parts += [Text(), *render_people(status.figures)]
    if status.worth is not None:
        parts += [Text(), render_worth(status.worth)]
    return Group(*parts)


def render_people(report: PeopleReport) -> list[RenderableType]:
    """Render figures by annotator, pairs with images in common, and accept rates by class."""
    people = Table("annotator", "images", "s each", "kept", "moved", "relabelled", "added",
                   "deleted", box=None)  # fmt: skip
    errors = Table("annotator", "error against others", "gold images", "error against gold",
                   box=None)  # fmt: skip
    for one in report.people:
        shares = (_percent(one.share(kind)) for kind in
                  ("kept", "moved", "relabelled", "added", "deleted"))  # fmt: skip
        seconds = "–" if one.seconds is None else f"{one.seconds:.0f}"
        people.add_row(Text(one.name), f"{one.images:,}", seconds, *shares)
        errors.add_row(
            Text(one.name), _percent(one.error_others), f"{one.gold_images:,}",
            _percent(one.error_gold),
        )  # fmt: skip
    parts: list[RenderableType] = [people, Text(), errors]
    bulk = sum(one.bulk for one in report.people)
    if bulk:
        parts.append(
            Text(f"  accepted in bulk, unlooked at: {counted(bulk, 'answer')}", style="dim")
        )
    if report.agreement:
        pairs = Table("agreement", "", "images", "boxes agreed on", box=None)
        for pair in report.agreement:
            names = (Text(pair.one), Text(pair.other))
            pairs.add_row(*names, f"{pair.images:,}", _percent(pair.share))
        parts += [Text(), pairs]
    if report.classes:
        rates = Table("class", "boxes shown", "left as they were", box=None)
        for rate in report.classes:
            rates.add_row(Text(rate.category), f"{rate.shown:,}", _percent(rate.kept / rate.shown))
        parts += [Text(), rates]
    return parts


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def render_worth(report: AuditReport) -> RenderableType:
    """Render the estimates of a label version, with their intervals."""
    rows = [
        ("precision", _share(report.precision)),
        ("recall" + (" (upper bound)" if report.recall_is_upper_bound else ""),
         _share(report.recall)),
        ("errors per 100 images", figure(report.errors_per_100_images)),
        ("errors found a minute, by value", figure(report.value.errors_per_minute)),
        ("errors found a minute, at random", figure(report.audit.errors_per_minute)),
        ("gain over random review", figure(report.gain)),
    ]  # fmt: skip
    title = f"{report.version}: from {report.sampled:,} audit images, for {report.images:,}"
    return Group(
        summary_table(title, rows), *(Text(f"  {note}", style="dim") for note in report.notes)
    )


def _share(estimate: Estimate) -> str:
    if estimate.value is None:
        return "unknown"
    return f"{estimate.value:.1%}  ({estimate.low:.1%} to {estimate.high:.1%})"


def figure(estimate: Estimate) -> str:
    """Show an estimate with its interval, or say that too few answers support one."""
    if estimate.value is None:
        return "unknown"
    if estimate.vague:
        return f"about {plain(estimate.value)}: too few answers to say how far off that may be"
    return f"{plain(estimate.value)}  ({plain(estimate.low)} to {plain(estimate.high)})"

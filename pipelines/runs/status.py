"""Read a run's progress from its output, with or without a running driver.

Counts come from the ledger where it knows a shard, else from the shard's footer; where images of
a shard were tombstoned since, from its live rows. So they are those of the live set, always.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipelines.display.durations import shown_duration
from pipelines.display.plural import counted
from pipelines.runs.bottleneck import WorkerTime
from pipelines.runs.drift_record import DriftRecord, known_drift
from pipelines.runs.pace import MeasuredPace, PaceCount
from storage.objects.prefetch import in_order
from storage.records import STATUSES, Status, warning_kinds
from storage.runs.ledger import LedgerEntry, invocations, read_ledger
from storage.runs.listing import Listing
from storage.runs.live_rows import live_tables
from storage.runs.manifest import Manifest
from storage.shards.selecting import shown_counts

# The driver beats every few seconds, and parts of the ledger are written every five.
SILENT_AFTER_S = 60.0
_FOOTER_READERS = 16

# What the statuses other than ok mean, for people.
_NOT_OK: dict[Status, str] = {
    "undecodable": "damaged, or not an image",
    "too_large": "beyond max_pixels or max_image_bytes",
    "unsupported": "a link or device, or a kind of image that is not read",
    "missing": "could not be read from the source, such as a file that is gone; the next "
    "`labelfleet run` looks again",
    "not_finite": "the network gave NaN or infinity for it, and none for a blank image",
}
State = Literal["running", "silent", "ended"]


@dataclass(frozen=True, slots=True)
class InvocationStatus:
    """The newest `labelfleet run` on this output, as its ledger has it.

    Attributes:
        invocation: its id.
        state: ``silent``: neither ended nor heard of for SILENT_AFTER_S; it has most likely died.
        outcome: done, quarantined, interrupted, failed; None while it has not ended.
        started_at: when its ledger began, seconds since the epoch, on the driver's clock.
        silent_s: since its last entry.
        workers: alive, as last reported; None where never reported.
        shards, images: done by this invocation.
        seconds: from the command's start to its last entry; of an older ledger, which does not say
            when that was, from the ledger's start.
        startup_s: the part of ``seconds`` before a worker was ready.
        images_per_s: from then to its last commit, see ``pipelines.runs.pace``.
        eta_s: until the last shard at the pace so far; only while it runs.
        stages: seconds by stage, over its workers and their threads; ``wait`` is the model's.
        fill: mean fill of the workers' queues, 0 to 1: images read, images decoded.
        limit: one sentence on what limits it; None before a shard was done.
    """

    invocation: str
    state: State
    outcome: str | None
    started_at: float
    silent_s: float
    workers: int | None
    shards: int
    images: int
    seconds: float
    startup_s: float
    images_per_s: float | None
    eta_s: float | None
    stages: dict[str, float] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)
    limit: str | None = None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run. Shards: ``listed = committed + quarantined + left``.

    Attributes:
        images: live rows per status, every status named.
        warnings: live rows by kind of warning; see docs/annotations.md.
        drift: how the later images compare with the first ones; None before a second listing.
        left_out: what the newest listing of the source passed over, by suffix or reason.
        dead_objects: annotation objects of shards that are no longer live.
        tombstones: images of live, labelled shards that changed or vanished after they were listed.
        plain_glob_exact: whether reading annotations/*.parquet without the listing is exact.
    """

    url: str
    name: str
    created_at: str
    listed: int
    committed: int
    quarantined: int
    left: int
    images: dict[str, int]
    detections: int
    dead_objects: int
    tombstones: int
    plain_glob_exact: bool
    invocation: InvocationStatus | None
    warnings: dict[str, int] = field(default_factory=dict)
    drift: DriftRecord | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(slots=True)
class _Tally:
    images: Counter[str] = field(default_factory=Counter)
    detections: int = 0
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, counts: dict[str, int], detections: int, warnings: dict[str, int]) -> None:
        self.images.update(counts)
        self.detections += detections
        self.warnings.update(warnings)


def run_status(manifest: Manifest, *, now: float | None = None) -> RunStatus:
    """Read a run's status from its output; nothing is written.

    Args:
        now: seconds since the epoch; None: this machine's clock.
    """
    return status_and_pace(manifest, now=now)[0]


def status_and_pace(
    manifest: Manifest, *, now: float | None = None
) -> tuple[RunStatus, MeasuredPace | None]:
    """Return also the pace of the newest invocation that labelled anything, from one reading."""
    listing = Listing(manifest.store)
    live = set(listing.live_ids())
    dropped = listing.dropped()
    annotated = manifest.committed()
    committed = live & annotated
    quarantined = (live & manifest.quarantined_ids()) - committed
    whole = committed - dropped.keys()
    tally, newest, pace = _read_ledgers(manifest, whole)
    _count_partly_live(manifest, committed & dropped.keys(), tally)
    left = len(live) - len(committed) - len(quarantined)
    dead = len(annotated - live)
    status = RunStatus(
        url=manifest.url,
        name=manifest.record.identity.name,
        created_at=manifest.record.created_at,
        listed=len(live),
        committed=len(committed),
        quarantined=len(quarantined),
        left=left,
        images={status: tally.images[status] for status in STATUSES},
        detections=tally.detections,
        dead_objects=dead,
        tombstones=sum(len(dropped[shard_id]) for shard_id in committed & dropped.keys()),
        plain_glob_exact=not dead and not (committed & dropped.keys()),
        invocation=newest.status(left, time.time() if now is None else now) if newest else None,
        warnings=dict(tally.warnings.most_common()),
        drift=known_drift(manifest.store),
        left_out=manifest.left_out(),
    )
    return status, pace


@dataclass(slots=True)
class _Invocation:
    """What the entries of one invocation add up to."""

    name: str
    first: LedgerEntry | None = None
    last: LedgerEntry | None = None
    outcome: str | None = None
    ended: bool = False
    workers: int | None = None
    pace: PaceCount = field(default_factory=PaceCount)
    time: WorkerTime = field(default_factory=WorkerTime)

    def add(self, entry: LedgerEntry) -> None:
        self.first = self.first or entry
        self.last = entry
        self.pace.add(entry)
        self.workers = entry.note.get("alive", entry.note.get("workers", self.workers))
        # A copy that lost the race for its shard does not count towards the run.
        if entry.event == "start" or (entry.event == "shard" and entry.note.get("won", True)):
            self.time.add(entry)
        elif entry.event == "end":
            self.ended, self.outcome = True, entry.note.get("outcome")

    def status(self, left: int, now: float) -> InvocationStatus | None:
        if self.first is None or self.last is None:
            return None
        silent_s = max(0.0, now - self.last.at)
        seconds = max(0.0, self.last.at - self.first.at)
        state: State = "ended" if self.ended else "running"
        if state == "running" and silent_s > SILENT_AFTER_S:
            state = "silent"
        pace = self.pace
        before_s = float(self.first.note.get("before_s", 0.0))  # such as Ray's own start
        return InvocationStatus(
            invocation=self.name,
            state=state,
            outcome=self.outcome,
            started_at=self.first.at,
            silent_s=silent_s,
            workers=self.workers,
            shards=pace.shards,
            images=pace.images,
            seconds=before_s + seconds,
            startup_s=before_s + pace.startup_s,
            images_per_s=pace.images_per_s,
            eta_s=pace.seconds_left(left, self.last.at, now) if state == "running" else None,
            stages={stage: round(s, 1) for stage, s in self.time.seconds.items()},
            fill={queue: round(share, 3) for queue, share in self.time.fill.items()},
            limit=self.time.limit,
        )


def _read_ledgers(
    manifest: Manifest, whole: set[str]
) -> tuple[_Tally, _Invocation | None, MeasuredPace | None]:
    """Add up the ledger's entries for these shards, and the footers of those it lacks."""
    tally, unknown = _Tally(), set(whole)
    newest: _Invocation | None = None
    pace: MeasuredPace | None = None
    # Newest first: a shard whose commit held missing images alone may have been labelled again.
    for name in reversed(invocations(manifest.store)):
        invocation = _Invocation(name)
        newest = newest or invocation
        for entry in read_ledger(manifest.store, name):
            invocation.add(entry)
            if entry.event == "shard" and entry.shard_id in unknown:
                unknown.discard(entry.shard_id)
                tally.add(entry.counts, entry.detections, entry.note.get("warnings", {}))
        pace = pace or invocation.pace.measured
    _count_footers(manifest, unknown, tally)
    return tally, newest, pace


def _count_footers(manifest: Manifest, shard_ids: Iterable[str], tally: _Tally) -> None:
    footers = in_order(sorted(shard_ids), manifest.footer, readers=_FOOTER_READERS)
    with closing(footers):
        for footer in footers:
            tally.add(footer.counts, footer.detections, footer.warnings)


def _count_partly_live(manifest: Manifest, shard_ids: set[str], tally: _Tally) -> None:
    if not shard_ids:
        return
    for _, table in live_tables(manifest, ["status", "detections", "warning"], only=shard_ids):
        counts = {str(v["values"]): int(v["counts"]) for v in _value_counts(table)}
        boxes = pc.sum(pc.list_value_length(table.column("detections"))).as_py() or 0
        kinds: Counter[str] = Counter()
        for warning in table.column("warning").drop_null().to_pylist():
            kinds.update(warning_kinds(warning))
        tally.add(counts, boxes, kinds)


def _value_counts(table: Any) -> list[dict[str, Any]]:
    counted: list[dict[str, Any]] = pc.value_counts(table.column("status")).to_pylist()
    return counted


def status_table(status: RunStatus) -> RenderableType:
    """Return the status for people."""
    s = status
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("run", escape(f"{s.name} at {s.url}"))
    table.add_row("shards", _shares(s))
    images = ", ".join(f"{n:,} {name}" for name, n in s.images.items() if n)
    table.add_row("images", images or "none yet")
    for name, why in _NOT_OK.items():
        if s.images.get(name):
            table.add_row("", Text(f"{name}: {why}", style="yellow"))
    if any(s.images.get(name) for name in _NOT_OK):
        table.add_row("", escape(f"`labelfleet report {s.url}` names them, each with its reason"))
    if s.warnings:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in s.warnings.items())
        table.add_row("warnings", escape(kinds))
    if s.left_out:
        table.add_row("left out", escape(shown_counts(s.left_out)))
    table.add_row("detections", f"{s.detections:,}")
    if s.drift is not None:
        table.add_row("drift", _drift_text(s.drift))
    table.add_row("last run", _sentence(s.invocation))
    if s.invocation and s.invocation.limit:
        table.add_row("limit", s.invocation.limit)
        table.add_row("stages", _stages(s.invocation))
    table.add_row("reading", escape(_reading(s)))
    return Group(table) if s.listed else Group(table, Text("nothing has been listed yet"))


def _reading(s: RunStatus) -> str:
    """Say what a plain read of the annotations gives; `gc` leaves single rows where they are."""
    if s.plain_glob_exact:
        return "annotations/*.parquet read as it is gives exactly the live rows"
    dead = counted(s.dead_objects, "dead object")
    gone = f"rows of up to {counted(s.tombstones, 'image')} that changed or vanished"
    there = " and ".join([dead] * bool(s.dead_objects) + [gone] * bool(s.tombstones))
    remedy = "read live rows through labelfleet"
    if s.dead_objects:
        what = ", which removes the former" if s.tombstones else ""
        remedy += f", or run `labelfleet gc {s.url}`{what}"
    return f"annotations/*.parquet also holds {there}: {remedy}"


def _drift_text(found: DriftRecord) -> Text:
    if not found.alarm_at:
        return Text(found.sentence)
    alarm = f"{found.alarm_at[:10]}: later images {found.alarm}"
    later = "" if found.alarm_at == found.checked_at else f"; since then {found.sentence}"
    return Text(alarm + later, style="yellow")


def _shares(s: RunStatus) -> str:
    percent = f" ({100 * s.committed / s.listed:.1f} %)" if s.listed else ""
    parts = [f"{s.committed:,} of {s.listed:,} labelled{percent}"]
    if s.left:
        parts.append(f"{s.left:,} left")
    if s.quarantined:
        parts.append(f"[red]{s.quarantined:,} quarantined[/red]")
    return ", ".join(parts)


def _sentence(i: InvocationStatus | None) -> str:
    if i is None:
        return "none has left a ledger"
    workers = "" if i.workers is None else f" on {counted(i.workers, 'worker')}"
    done = f"{counted(i.images, 'image')} in {shown_duration(i.seconds)}{_pace(i)}"
    if i.state == "ended":
        return f"{escape(i.outcome or 'ended')}: {done}, ended {shown_duration(i.silent_s)} ago"
    if i.state == "silent":
        return (
            f"[yellow]silent for {shown_duration(i.silent_s)}[/yellow], so it has most likely "
            f"died: {done}. The same `labelfleet run` continues it"
        )
    eta = f", about {shown_duration(i.eta_s)} to go" if i.eta_s is not None else ""
    return f"[green]running[/green]{workers}: {done}{eta}"


def _pace(i: InvocationStatus) -> str:
    """Tell the pace, and that start-up is left out of it where that makes a difference."""
    if not i.images_per_s:
        return ""
    if i.startup_s < 1:
        return f", {i.images_per_s:,.1f} images/s"
    return f" ({shown_duration(i.startup_s)} of them start-up), then {i.images_per_s:,.1f} images/s"


def _stages(i: InvocationStatus) -> str:
    seconds = ", ".join(f"{stage} {shown_duration(s)}" for stage, s in i.stages.items() if s)
    fill = ", ".join(f"{queue} {100 * share:.0f} %" for queue, share in i.fill.items())
    return f"{seconds}; queues: {fill}" if fill else seconds

"""``labelfleet gc``: remove objects from a run's output that no reader uses.

Every rule below says what it finds and why it is unused. What is younger than a day stays, since
a writer that was thought dead may still be at it; rows of a shard that was dropped stay for a day
after the drop, since its images may come back; ages are told by the store's own clock, from the
lock that gc itself has just written. Listings, ledgers, answers, finished label versions and the
rows of live shards are never touched, nor anything whose name is not one of ours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipelines.display.plural import counted
from storage.labels.versions import LABELS, versions
from storage.objects.preflight import PROBE
from storage.records import StoredObject
from storage.review.frames import FRAMES
from storage.review.queue import IMAGES, queue_parts, read_head, read_queue
from storage.runs.generations import PARTS, SOURCE
from storage.runs.listing import Listing
from storage.runs.lock import LOCK_KEY, RunLock, run_lock
from storage.runs.manifest import ANNOTATIONS, QUARANTINE, Manifest

DAY_S = 86_400.0
_DELETERS = 16
_SHOWN = 20

_ANNOTATION = re.compile(rf"{ANNOTATIONS}([0-9a-f]{{16}})\.parquet")
_QUARANTINED = re.compile(rf"{QUARANTINE}([0-9a-f]{{16}})\.json")
_COPIED_IMAGE = re.compile(rf"{IMAGES}([0-9a-f]{{64}})\.\w+")
_LISTING_PART = re.compile(rf"{PARTS}\d+-[0-9a-f]{{16}}-\d{{5,}}\.parquet")
_PROBE = re.compile(rf"{PROBE}[0-9a-f]{{16}}\.probe")
_IN_VERSION = re.compile(rf"{LABELS}(v\d+)/.+")


@dataclass(frozen=True, slots=True)
class Garbage:
    """An unused object, and why it is unused."""

    key: str
    nbytes: int
    why: str


@dataclass(frozen=True, slots=True)
class GcSummary:
    """What was removed, or with ``dry_run`` would be.

    Attributes:
        garbage: every object, ordered by reason and key.
        nbytes: theirs.
        young: further objects that are left, since they are not older than ``older_than_s``.
    """

    url: str
    garbage: list[Garbage]
    nbytes: int
    young: int
    older_than_s: float
    dry_run: bool

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def collect_garbage(
    manifest: Manifest, *, older_than_s: float = DAY_S, dry_run: bool = False
) -> GcSummary:
    """Remove what no reader uses. A second call finds nothing more.

    Args:
        manifest: the run.
        older_than_s: only objects that were written, and whose shards were dropped, at least so
            long ago; 0: all of them, for when certainly no process writes.
        dry_run: only report what would be removed; write nothing, not even the lock.

    Raises:
        RunLocked: another process is working on the run, or took it over meanwhile.
        StorageError: what was removed until then stays removed.
    """
    locked = nullcontext() if dry_run else run_lock(manifest.store, "labelfleet gc")
    with locked as lock:
        now_s = time.time() if lock is None else manifest.store.head(LOCK_KEY).modified_at
        garbage, young = [], 0
        dropped_at = _dropped_at(manifest)
        for found, why in find_garbage(manifest):
            since = dropped_at.get(_shard_of(found.key), found)
            if min(_age_s(found, now_s), _age_s(since, now_s)) >= older_than_s:
                garbage.append(Garbage(found.key, found.nbytes, why))
            else:
                young += 1
        garbage.sort(key=lambda g: (g.why, g.key))
        if lock is not None:
            _delete(manifest, garbage, lock)
    nbytes = sum(g.nbytes for g in garbage)
    return GcSummary(manifest.url, garbage, nbytes, young, older_than_s, dry_run)


def find_garbage(manifest: Manifest) -> Iterator[tuple[StoredObject, str]]:
    """Yield (object, why it is unused), each once, of any age."""
    live = set(Listing(manifest.store).live_ids())
    annotated = list(manifest.annotation_objects())
    yield from _dead_rows(annotated, live)
    labelled = {m[1] for o in annotated if (m := _ANNOTATION.fullmatch(o.key))} & live
    yield from _idle_quarantine(manifest, live, labelled)
    yield from _uncommitted_parts(manifest)
    yield from _unfinished_versions(manifest)
    yield from _unread_review(manifest)
    for found in manifest.store.list(PROBE):
        if _PROBE.fullmatch(found.key):
            yield found, "a probe whose writer died"
    yield from ((o, "a temporary file of a dead writer") for o in manifest.store.leftovers())


def _dead_rows(
    annotated: Iterable[StoredObject], live: set[str]
) -> Iterator[tuple[StoredObject, str]]:
    for found in annotated:
        named = _ANNOTATION.fullmatch(found.key)
        if named and named[1] not in live:
            yield found, "rows of a shard that is not live: changed, deleted, or never listed"


def _idle_quarantine(
    manifest: Manifest, live: set[str], labelled: set[str]
) -> Iterator[tuple[StoredObject, str]]:
    for found in manifest.store.list(QUARANTINE):
        named = _QUARANTINED.fullmatch(found.key)
        if named and named[1] in labelled:
            yield found, "a quarantine record of a shard that is labelled"
        elif named and named[1] not in live:
            yield found, "a quarantine record of a shard that is not live"


def _uncommitted_parts(manifest: Manifest) -> Iterator[tuple[StoredObject, str]]:
    named = set(Listing(manifest.store).parts())
    for found in manifest.store.list(PARTS):
        if _LISTING_PART.fullmatch(found.key) and found.key not in named:
            yield found, "part of a listing that was never committed"


def _unfinished_versions(manifest: Manifest) -> Iterator[tuple[StoredObject, str]]:
    finished = set(versions(manifest.store))
    for found in manifest.store.list(f"{LABELS}v"):
        named = _IN_VERSION.fullmatch(found.key)
        # The claim stays: a number that was assigned once is never assigned again.
        if named and named[1] not in finished and not found.key.endswith("/claim.json"):
            yield found, "part of a label version that was never finished"


def _unread_review(manifest: Manifest) -> Iterator[tuple[StoredObject, str]]:
    store = manifest.store
    parts = queue_parts(store)
    frames = {read_head(store, part).frame for part in parts}
    for found in store.list(FRAMES):
        if found.key not in frames:
            yield found, "a shard list of a routing that was never finished"
    routed = {item.sha256 for item in read_queue(store, parts, hidden=True)}
    for found in store.list(IMAGES):
        named = _COPIED_IMAGE.fullmatch(found.key)
        if named and named[1] not in routed:
            yield found, "a copy of an image that is in no review queue"


def _shard_of(key: str) -> str:
    """Return the shard that an object with rows or a quarantine record is of.

    '' for other objects.
    """
    named = _ANNOTATION.fullmatch(key) or _QUARANTINED.fullmatch(key)
    return named[1] if named else ""


def _dropped_at(manifest: Manifest) -> dict[str, StoredObject]:
    """Return the listing that dropped from a shard last, by shard id: its age is the drop's."""
    listings = {o.key: o for o in manifest.store.list(SOURCE)}
    dropped = Listing(manifest.store).dropped_by()
    return {shard_id: listings[key] for shard_id, key in dropped.items() if key in listings}


def _age_s(found: StoredObject, now_s: float | None) -> float:
    if found.modified_at is None or now_s is None:
        return 0.0  # unknown: never old enough, unless any age will do
    return max(0.0, now_s - found.modified_at)


def _delete(manifest: Manifest, garbage: Iterable[Garbage], lock: RunLock) -> None:
    keys = iter([g.key for g in garbage])
    with ThreadPoolExecutor(_DELETERS) as pool:
        while some := list(islice(keys, 16 * _DELETERS)):
            lock.check()
            list(pool.map(manifest.store.delete, some))


def parse_age(text: str) -> float:
    """Return the seconds of ``36h``, ``1d``, ``90m``, ``30s`` or ``0``. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None or (not match[2] and float(match[1])):
        raise ValueError(f"{text!r} is not an age; write 12h, 1d, 30m or 0")
    return float(match[1]) * {"": 0, "s": 1, "m": 60, "h": 3600, "d": DAY_S}[match[2]]


def garbage_table(summary: GcSummary) -> RenderableType:
    """Render the result for people."""
    done = "would be removed" if summary.dry_run else "removed"
    total = f"{counted(len(summary.garbage), 'object')}, {decimal(summary.nbytes)} {done}"
    remarks: list[RenderableType] = [Text(total)]
    if summary.young:
        age = f"{summary.older_than_s / 3600:g} hours"
        remarks.append(Text(f"{summary.young:,} more are left: not older than {age}"))
    if not summary.garbage:
        return Group(*remarks)
    return Group(_by_reason(summary.garbage), _some_keys(summary.garbage), *remarks)


def _by_reason(garbage: Iterable[Garbage]) -> Table:
    sums: dict[str, tuple[int, int]] = {}
    for g in garbage:
        count, nbytes = sums.get(g.why, (0, 0))
        sums[g.why] = (count + 1, nbytes + g.nbytes)
    table = Table(box=None, pad_edge=False)
    for column in ("objects", "size"):
        table.add_column(column, justify="right")
    table.add_column("what")
    for why, (count, nbytes) in sums.items():
        table.add_row(f"{count:,}", decimal(nbytes), why)
    return table


def _some_keys(garbage: list[Garbage]) -> Text:
    lines = [f"  {g.key}  {decimal(g.nbytes)}" for g in garbage[:_SHOWN]]
    if len(garbage) > _SHOWN:
        lines.append(f"  … and {len(garbage) - _SHOWN:,} more; all of them with --json")
    return Text("\n".join(lines), "dim")

"""``labelfleet verify``: does a run hold what its listing, its footers and its ledger say?

Reads every annotation object of a live shard, whole, several at a time, and changes nothing. A
shard that is not labelled yet is work left, not a difference, unless ``complete`` asks for all of
them. What an object must hold is in storage/runs/annotation_check.py. Safe beside a running run:
the ledger is read first, then what is committed, and the listing last, so that each can only have
grown since the one before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from storage.errors import ObjectNotFound, StorageError
from storage.objects.prefetch import in_order
from storage.records import STATUSES, Shard, printable, shard_id_of
from storage.runs.annotation_check import ObjectCheck, check_object
from storage.runs.ledger import invocations, read_ledger
from storage.runs.listing import Listing
from storage.runs.manifest import ANNOTATIONS, QUARANTINE, Manifest, annotation_key
from storage.shards.reading import SupportsShards, member_ids

READERS = 16
_AHEAD_BYTES = 256 << 20
_KEPT = 10_000  # differences that are kept as sentences; all are counted

Counts = tuple[int, ...]  # rows by STATUSES, then boxes


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it was promised. ``shard_id`` is '' where it is about no shard."""

    key: str
    shard_id: str
    what: str


@dataclass(frozen=True, slots=True)
class Orphan:
    """An object below annotations/ that is no live shard's."""

    key: str
    nbytes: int
    why: str


@dataclass(slots=True)
class Verification:
    """What verify found. Shards: ``listed = committed + quarantined + left``.

    Attributes:
        images, detections: rows and boxes in the live shards' objects, tombstoned ones included.
        nbytes: of those objects.
        tars_reread: tars whose members were read again from the source.
        orphans: named; those that a later listing dropped are no difference, `gc` removes them.
        remarks: worth knowing, and no difference.
        differences: the first ten thousand. ``found``: all of them.
    """

    url: str
    name: str
    complete: bool
    listed: int = 0
    committed: int = 0
    quarantined: int = 0
    left: int = 0
    images: int = 0
    detections: int = 0
    nbytes: int = 0
    tars_reread: int = 0
    orphans: list[Orphan] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    found: int = 0

    @property
    def clean(self) -> bool:
        """Nothing differs."""
        return not self.found

    @property
    def exit_code(self) -> int:
        """For the process."""
        return 0 if self.clean else 1

    def differs(self, key: str, shard_id: str, what: str) -> None:
        """Note a difference."""
        self.found += 1
        if len(self.differences) < _KEPT:
            self.differences.append(Difference(key, shard_id, what))

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {"clean": self.clean, **asdict(self)}


def verify_run(
    manifest: Manifest,
    *,
    complete: bool = False,
    source: SupportsShards | None = None,
    readers: int = READERS,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Verification:
    """Check a whole run.

    Args:
        manifest: the run.
        complete: shards that are left or quarantined are differences too.
        source: where the images lie; tars are then read again, and their members compared. None:
            the source is not touched, and of a tar's rows only their names are checked.
        readers: objects fetched at a time.
        progress: told how many shards of how many are done.

    Raises:
        StorageError: the output (or the source) cannot be reached; says nothing about the run.
    """
    result = Verification(manifest.url, manifest.record.identity.name, complete)
    ledger = read_ledger_counts(manifest)
    annotated = {o.key: o.nbytes for o in manifest.store.list(ANNOTATIONS)}
    quarantined = _quarantine(manifest, result)
    try:
        listing = Listing(manifest.store)
        result.listed = listing.count()
        _check_listing(listing, result)
    except StorageError as exc:
        if type(exc) is not StorageError:
            raise
        result.differs("source/", "", exc.message)
        return result
    check = _Check(manifest, listing, annotated, quarantined, ledger, result)
    check.shards(source, readers, progress)
    check.orphans()
    return result


@dataclass(slots=True)
class _Check:
    """One verification under way."""

    manifest: Manifest
    listing: Listing
    annotated: dict[str, int]  # bytes by key
    quarantined: set[str]
    ledger: dict[int, Counts]
    result: Verification

    def shards(
        self,
        source: SupportsShards | None,
        readers: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Every live shard, in listing order."""
        checked = in_order(
            self._committed(),
            lambda shard: (shard, self._look(shard, source)),
            lambda shard: self.annotated[annotation_key(shard.shard_id)],
            readers=readers,
            ahead_bytes=_AHEAD_BYTES,
        )
        with closing(checked):
            for shard, found in checked:
                self._note(shard, found)
                progress(self.result.committed, self.result.listed)

    def _committed(self) -> Iterator[Shard]:
        """Live shards that have an object; the others are counted as they come by."""
        for shard in self.listing.live_shards():
            if shard_id_of(shard.objects) != shard.shard_id:
                self.result.differs("source/", shard.shard_id, "its id is not that of its objects")
            if annotation_key(shard.shard_id) in self.annotated:
                yield shard
            else:
                self._uncommitted(shard)

    def _uncommitted(self, shard: Shard) -> None:
        key, result = annotation_key(shard.shard_id), self.result
        # What gc removed while the shard was not live is labelled again when it comes back.
        lost = int(shard.shard_id, 16) in self.ledger and not self.listing.returned(shard.shard_id)
        if lost:
            result.differs(key, shard.shard_id, "the ledger saw it labelled; it is gone")
        if shard.shard_id in self.quarantined:
            result.quarantined += 1
        else:
            result.left += 1
        if result.complete and not lost:
            state = "quarantined" if shard.shard_id in self.quarantined else "not labelled yet"
            result.differs(key, shard.shard_id, f"{state}: {printable(shard.key)}")

    def _look(self, shard: Shard, source: SupportsShards | None) -> ObjectCheck | None:
        """In one of the readers' threads. None: the object is gone."""
        key = annotation_key(shard.shard_id)
        try:
            raw = self.manifest.store.get(key)
        except ObjectNotFound:
            return None
        reread = source is not None and shard.kind == "tar"
        members = member_ids(source, shard) if source is not None and reread else None
        return check_object(raw, key, shard, self.manifest.record.identity, members)

    def _note(self, shard: Shard, found: ObjectCheck | None) -> None:
        key, result = annotation_key(shard.shard_id), self.result
        nbytes = self.annotated.pop(key)
        result.committed += 1
        if found is None:
            result.differs(key, shard.shard_id, "it vanished while the run was verified")
            return
        result.nbytes += nbytes
        result.images += found.images
        result.detections += found.detections
        result.tars_reread += found.compared
        for problem in found.problems:
            result.differs(key, shard.shard_id, problem)
        if found.footer is not None and found.footer.source_truncated:
            result.remarks.append(printable(f"{shard.key}: {found.footer.source_truncated}"))
        said = self.ledger.get(int(shard.shard_id, 16))
        if found.readable and said is not None and said != _counts(found.counts, found.detections):
            result.differs(key, shard.shard_id, "the ledger counted other rows or boxes")
        if shard.shard_id in self.quarantined:
            result.remarks.append(
                f"{QUARANTINE}{shard.shard_id}.json: the shard is labelled; the next run, or gc, "
                "removes the record"
            )

    def orphans(self) -> None:
        """What lies below annotations/ and is no live shard's."""
        if not self.annotated:
            return
        ever = {annotation_key(shard_id) for shard_id in self.listing.all_ids()}
        for key, nbytes in self.annotated.items():
            if key in ever:
                why = "its shard is not live any more; `labelfleet gc` removes it"
            elif key.endswith(".parquet"):
                why = "no listing has its shard, and whoever reads annotations/*.parquet reads it"
                self.result.differs(key, "", why)
            else:
                why = "not one of labelfleet's"
            self.result.orphans.append(Orphan(key, nbytes, why))


def read_ledger_counts(manifest: Manifest) -> dict[int, Counts]:
    """What the ledgers say of every shard they saw labelled, by the shard id as a number.

    Equal counts are one object, so that a million shards cost some 100 MB.
    """
    same: dict[Counts, Counts] = {}
    found: dict[int, Counts] = {}
    for invocation in invocations(manifest.store):
        for entry in read_ledger(manifest.store, invocation):
            if entry.event == "shard" and entry.shard_id is not None:
                with suppress(ValueError):  # a damaged line: the ledger is a cache
                    number = int(entry.shard_id, 16)
                    counts = _counts(entry.counts, entry.detections)
                    found[number] = same.setdefault(counts, counts)
    return found


def _counts(counts: Any, detections: int) -> Counts:
    return (*(counts.get(status, 0) for status in STATUSES), detections)


def _quarantine(manifest: Manifest, result: Verification) -> set[str]:
    found = manifest.quarantined_ids()
    for shard_id in sorted(found):
        key = f"{QUARANTINE}{shard_id}.json"
        try:
            record = json.loads(manifest.store.get(key))
            if record["shard_id"] != shard_id:
                result.differs(key, shard_id, f"it is the record of shard {record['shard_id']}")
        except ObjectNotFound:
            continue  # released meanwhile
        except (ValueError, KeyError, TypeError) as exc:
            result.differs(key, shard_id, f"it is not a readable quarantine record: {exc}")
    return found


def _check_listing(listing: Listing, result: Verification) -> None:
    for key, one, other in listing.doubled():
        what = f"{printable(key)} is live in this shard and in {other}"
        result.differs("source/", one, what)

"""``labelfleet verify``: check a run against its records, listing, footers and ledger.

Changes nothing, and no damage ends it: what is wrong with an object becomes a difference that names
it, and the next object is looked at. docs/operations.md says what is promised at each level. A
shard that is not labelled yet is work left, not a difference, unless ``complete`` asks for all of
them. Safe beside a running run: the ledger is read first, then what is committed, and the listing
last, so that each can only have grown since the one before it.
"""

from __future__ import annotations

from collections.abc import Callable

from pipelines.runs.verification import Orphan, Verification
from pipelines.runs.verify_records import RecordCheck, check_records, read_ledgers
from pipelines.runs.verify_shards import ShardCheck
from storage.errors import StorageError
from storage.records import printable
from storage.runs.listing import Listing
from storage.runs.manifest import ANNOTATIONS, Manifest
from storage.shards.reading import SupportsShards

READERS = 16


def verify_run(
    manifest: Manifest,
    *,
    quick: bool = False,
    complete: bool = False,
    source: SupportsShards | None = None,
    readers: int = READERS,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Verification:
    """Check a whole run.

    Args:
        manifest: the run.
        quick: read records and footers, but neither rows nor large files.
        complete: shards that are left or quarantined are differences too.
        source: where the images lie; they are then read again, hashed and compared with their
            rows. None: the source is not touched, and of a tar's rows only their names are checked.
        readers: objects fetched at a time.
        progress: told how many shards of how many are done.

    Raises:
        StorageError: the output (or the source) cannot be reached; says nothing about the run.
    """
    result = Verification(manifest.url, manifest.record.identity.name, complete, quick)
    ledger = read_ledgers(manifest, _differs(result))
    annotated = {o.key: o for o in manifest.store.list(ANNOTATIONS)}
    records = check_records(manifest, _differs(result), quick=quick)
    _take(records, result)
    try:
        listing = Listing(manifest.store)
        result.listed = listing.count()
        for key, one, other in listing.doubled():
            what = f"{printable(key)} is live in this shard and in {other}"
            result.differs("source/", one, what)
        result.unsealed += listing.unsealed()
        check = ShardCheck(manifest, listing, annotated, records.quarantined, ledger, result)
        check.shards(None if quick else source, readers, progress)
    except StorageError as exc:
        if type(exc) is not StorageError:
            raise
        result.differs("source/", "", exc.message)
        return result
    for key, nbytes, why, is_difference in check.orphans():
        result.orphans.append(Orphan(key, nbytes, why))
        if is_difference:
            result.differs(key, "", why)
    _remark(result)
    return result


def _differs(result: Verification) -> Callable[[str, str], None]:
    return lambda key, what: result.differs(key, "", what)


def _take(records: RecordCheck, result: Verification) -> None:
    result.label_versions = records.label_versions
    result.queue_parts, result.answer_parts = records.queue_parts, records.answer_parts
    result.model_files = records.model_files
    result.unsealed += records.unsealed
    result.remarks += records.remarks


def _remark(result: Verification) -> None:
    if result.unsealed:
        result.remarks.append(
            f"{result.unsealed:,} objects of an older labelfleet carry no checksum: "
            "of those, only contradictions are noticed"
        )
    if result.images_changed:
        result.remarks.append(
            f"{result.images_changed:,} images could not be compared with their rows: they changed "
            "or are gone since they were listed"
        )

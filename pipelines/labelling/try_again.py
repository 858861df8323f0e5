"""Find images that were recorded as missing and can be read now, to label them again."""

from __future__ import annotations

from collections.abc import Iterator, Set
from functools import partial
from itertools import islice

from storage.errors import LabelfleetError
from storage.objects.prefetch import in_order
from storage.objects.protocols import SupportsStream
from storage.records import Shard, StoredObject, image_ids_of
from storage.runs.annotations import read_tables
from storage.runs.ledger import invocations, read_ledger
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest, annotation_key

_READERS = 16
_AT_ONCE = 20_000  # shards that one invocation looks at


def readable_again(manifest: Manifest, source: SupportsStream) -> frozenset[str]:
    """Return the keys of images whose row says ``missing`` and that can be read as listed.

    A refresh of the listing moves them into new shards. A commit in which every row says
    ``missing`` holds no label: it is deleted when anything of its shard can be read, so that the
    shard is labelled as it is, and its keys are not returned.

    Raises StorageError where the run cannot be read.
    """
    listing = Listing(manifest.store)
    suspects = _with_missing_rows(manifest, manifest.committed() & set(listing.live_ids()))
    if not suspects:
        return frozenset()
    again: set[str] = set()
    for shard, objects, all_missing in islice(_missing(manifest, listing, suspects), _AT_ONCE):
        readable = list(in_order(objects, partial(_is_readable, source), readers=_READERS))
        if all_missing and any(readable):
            manifest.store.delete(annotation_key(shard.shard_id))
        elif not all_missing:
            again.update(o.key for o, ok in zip(objects, readable, strict=True) if ok)
    return frozenset(again)


def _with_missing_rows(manifest: Manifest, committed: Set[str]) -> set[str]:
    """Shards with such rows, by the ledgers where they know a shard, else by its footer."""
    unknown, found = set(committed), set[str]()
    for name in reversed(invocations(manifest.store)):  # a shard's newest entry counts
        for entry in read_ledger(manifest.store, name):
            if entry.event == "shard" and entry.shard_id in unknown:
                unknown.discard(entry.shard_id)
                if entry.counts.get("missing"):
                    found.add(entry.shard_id)
    footers = in_order(sorted(unknown), manifest.footer, readers=_READERS)
    return found | {footer.shard_id for footer in footers if footer.counts.get("missing")}


def _missing(
    manifest: Manifest, listing: Listing, suspects: Set[str]
) -> Iterator[tuple[Shard, list[StoredObject], bool]]:
    """Each suspect, its live objects whose row says ``missing``, and whether every row does."""
    dropped = listing.dropped()
    others = frozenset(listing.live_ids()) - suspects
    for shard in listing.live_shards(skip=others):
        rows, missing = 0, set[str]()
        columns = ["image_id", "status"]
        for table in read_tables(manifest.store, annotation_key(shard.shard_id), columns):
            rows += table.num_rows
            missing.update(
                row["image_id"] for row in table.to_pylist() if row["status"] == "missing"
            )
        gone = dropped.get(shard.shard_id, set())
        objects = [
            o for o in shard.objects if o.key not in gone and missing & {*image_ids_of(o.key)}
        ]
        if objects:
            yield shard, objects, len(missing) == rows


def _is_readable(source: SupportsStream, listed: StoredObject) -> bool:
    try:
        with source.stream(listed.key, if_match=listed.etag) as file:
            file.read(1)
    except LabelfleetError:
        return False
    return True

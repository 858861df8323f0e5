"""Relocate: continue a run whose source was moved, after checking that it is the same source."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from storage.errors import LabelfleetError, SourceError
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import ImageRef, Shard, StoredObject, image_ids_of
from storage.runs.annotations import read_tables
from storage.runs.listing import Listing, Version
from storage.runs.lock import run_lock
from storage.runs.manifest import Manifest, annotation_key
from storage.shards.frames import Wanted, as_labelled, file_id
from storage.shards.reading import read_shard
from storage.stores.open import open_store
from storage.urls import normalise_url, shown_url

_FROM_A_SHARD = 4  # most images compared: many shards tell more than many images of one
_MOST_NBYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Relocation:
    """What ``relocate`` found and did.

    Attributes:
        objects: of the listing, all there with their sizes.
        compared: labelled images whose bytes have the digest that their rows say.
        added: objects at the new place that are not listed; the next run looks at them.
    """

    run: str
    before: str
    now: str
    objects: int
    compared: int
    added: int

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def relocate_run(
    manifest: Manifest, url: str, options: StorageOptions, *, sample: int = 200
) -> Relocation:
    """Point a run at the place to which its source was moved. Labels and shards stay.

    Args:
        url: where the same keys lie now.
        sample: labelled images that are read there and compared with their rows, at most.

    Raises:
        SourceError: an object is not there, has another size, or other bytes; nothing was changed.
        StorageError: source or output cannot be reached.
        RunLocked: a run is going.
    """
    place = normalise_url(url)
    source = open_store(place, options)
    with run_lock(manifest.store, f"labelfleet relocate {shown_url(place)}") as lock:
        before = str(manifest.record.source["url"])
        listing = Listing(manifest.store)
        moved, added = _compare_listings(listing, source)
        compared = _compare_images(manifest, listing, source, moved, sample)
        lock.check()
        # Neither: an interrupted move of which only the last step is missing.
        if listing.place() != place or any(new != etag for (_, _, etag), new in moved.items()):
            listing.moved_to(moved, place)
        manifest.move_source(place)
    return Relocation(manifest.url, before, place, len(moved), compared, added)


def _compare_listings(listing: Listing, source: ObjectStore) -> tuple[dict[Version, str], int]:
    """Return the new etag of each live object, and how many objects are new."""
    moved: dict[Version, str] = {}
    absent: list[str] = []
    resized: list[str] = []
    added = 0
    for new, known in listing.joined(source.list()):
        if known is None:
            added += 1
        elif new is None:
            absent.append(known.listed.key)
        elif new.nbytes != known.listed.nbytes:
            resized.append(new.key)
        else:
            old = known.listed
            moved[old.key, old.nbytes, old.etag] = new.etag
    known_objects = len(moved) + len(absent) + len(resized)
    for keys, what in ((absent, "are not at"), (resized, "have another size at")):
        if keys:
            examples = ", ".join(repr(key) for key in keys[:3])
            raise SourceError(
                f"{len(keys):,} of {known_objects:,} listed objects {what} "
                f"{shown_url(source.url)}, such as {examples}; nothing was changed",
                hint="check the URL: keys below it must be as they were; what was deleted or "
                "changed on purpose is first taken note of by a run at the old place",
            )
    return moved, added


def _compare_images(
    manifest: Manifest,
    listing: Listing,
    source: ObjectStore,
    moved: dict[Version, str],
    sample: int,
) -> int:
    """Read a sample of the labelled images at the new place. Raises SourceError."""
    compared = 0
    for shard in _drawn(listing, manifest.committed(), sample):
        there = replace(shard, objects=tuple(_there(o, moved) for o in shard.objects))
        rows = _digests(manifest, shard, min(_FROM_A_SHARD, sample - compared))
        for image_id, found in _bodies(source, there, rows):
            if (
                isinstance(found, LabelfleetError)
                or hashlib.sha256(found).hexdigest() != rows[image_id]["sha256"]
            ):
                why = found.message if isinstance(found, LabelfleetError) else "other bytes"
                raise SourceError(
                    f"{image_id!r} at {shown_url(source.url)} is not what was labelled: {why}; "
                    "nothing was changed",
                    hint="the source is another one or was changed: give it its own run",
                )
            compared += 1
        if compared >= sample:
            break
    return compared


def _drawn(listing: Listing, committed: set[str], sample: int) -> Iterator[Shard]:
    """Yield a random choice of labelled shards, the same every time."""
    ids = sorted(committed.intersection(listing.live_ids()))
    drawn = set(random.Random(0).sample(ids, min(sample, len(ids))))
    yield from listing.live_shards(skip=committed.union(listing.all_ids()) - drawn)


def _there(listed: StoredObject, moved: dict[Version, str]) -> StoredObject:
    return replace(listed, etag=moved.get((listed.key, listed.nbytes, listed.etag), listed.etag))


def _digests(manifest: Manifest, shard: Shard, count: int) -> dict[str, dict[str, Any]]:
    """Return some live rows of a shard that have a digest, by image id."""
    gone = Listing(manifest.store).dropped().get(shard.shard_id, set())
    dropped = {image_id for key in gone for image_id in image_ids_of(key)}
    columns = ["image_id", "offset", "nbytes", "sha256", "status"]
    rows = [
        row
        for table in read_tables(manifest.store, annotation_key(shard.shard_id), columns)
        for row in table.to_pylist()
        if row["sha256"]
        and row["status"] != "missing"
        and dropped.isdisjoint((row["image_id"], file_id(row["image_id"])))
    ]
    chosen = random.Random(shard.shard_id).sample(rows, min(count, len(rows)))
    return {row["image_id"]: row for row in chosen}


def _bodies(
    source: ObjectStore, shard: Shard, rows: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, bytes | LabelfleetError]]:
    if any(row["offset"] is None for row in rows.values()):  # a compressed tar
        left = Wanted(
            ImageRef(image_id, shard.shard_id, None, row["nbytes"], row["sha256"])
            for image_id, row in rows.items()
        )
        for image in read_shard(source, shard, max_image_bytes=_MOST_NBYTES):
            for place, data in left.of(image):
                yield place.image_id, data
        yield from ((one.image_id, SourceError("it is not in the tar")) for one in left.left)
        return
    by_id = {image_id: o for o in shard.objects for image_id in image_ids_of(o.key)}
    for image_id, row in rows.items():
        listed = by_id.get(image_id) or by_id.get(file_id(image_id)) or shard.objects[0]
        yield image_id, _body(source, listed, image_id, row)


def _body(
    source: ObjectStore, listed: StoredObject, image_id: str, row: dict[str, Any]
) -> bytes | LabelfleetError:
    try:
        body = source.get_range(listed.key, row["offset"], row["nbytes"], if_match=listed.etag)
    except LabelfleetError as exc:
        return exc
    return as_labelled(body, image_id, row["sha256"])


def relocated_table(done: Relocation) -> RenderableType:
    """Render the result for people."""
    lines = [
        f"{done.run}: the source was {shown_url(done.before)}, and is {shown_url(done.now)} now",
        f"{done.objects:,} objects are there with their sizes, {done.compared:,} labelled images "
        "with their digests",
    ]
    if done.added:
        lines.append(f"{done.added:,} more objects are there; the next run looks at them")
    lines.append(f"set source.url to {shown_url(done.now)} in the config; then run it as before")
    return Text("\n".join(lines))

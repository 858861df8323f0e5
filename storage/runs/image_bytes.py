"""Read the bytes of labelled images from the source again.

Uses ranged reads, with If-Match on the listed version; a compressed tar, where offsets do not help,
is read once for all requested images. Of an object that has another version now, such as one that
was copied back with another time, the images count whose bytes still have the digest of their rows.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from storage.errors import LabelfleetError, ObjectChanged, ObjectNotFound, StorageError
from storage.objects.prefetch import in_order
from storage.objects.protocols import ObjectStore
from storage.records import ImageRef, Shard, StoredObject, image_ids_of
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.shards.frames import Wanted, as_labelled, file_id
from storage.shards.reading import read_shard

_FETCHERS = 8


P = TypeVar("P", bound=ImageRef)
Fetched = bytes | LabelfleetError


def read_images(
    manifest: Manifest,
    source: ObjectStore,
    places: Sequence[P],
    *,
    shards: dict[str, Shard] | None = None,
) -> Iterator[tuple[P, Fetched]]:
    """Yield every image with its bytes, or with the reason why not, in no particular order.

    Only a few dozen images are in memory at a time.

    Args:
        manifest: the run, whose listing says where the bytes are.
        source: the store that was labelled.
        places: which images.
        shards: the images' shards, where the caller knows them; None: looked up in the listing.
    """
    if shards is None:
        shards = shards_of(manifest, {place.shard_id for place in places})
    compressed: dict[str, list[P]] = defaultdict(list)
    ranged = []
    for place in places:
        if place.offset is None:
            compressed[place.shard_id].append(place)
        else:
            ranged.append(place)
    with closing(in_order(ranged, partial(_fetch, source, shards), readers=_FETCHERS)) as bodies:
        yield from zip(ranged, bodies, strict=True)
    for shard_id, wanted in compressed.items():
        yield from _from_compressed(source, shards.get(shard_id), wanted)


def fetch_images(
    manifest: Manifest, source: ObjectStore, places: Sequence[ImageRef]
) -> dict[str, Fetched]:
    """Read all images at once, by image_id; see ``read_images``."""
    return {place.image_id: raw for place, raw in read_images(manifest, source, places)}


def shards_of(manifest: Manifest, wanted: set[str]) -> dict[str, Shard]:
    """Return the listed shards of these ids; ids that are not listed are left out."""
    found: dict[str, Shard] = {}
    for shard in Listing(manifest.store).all_shards() if wanted else ():
        if shard.shard_id in wanted:
            found[shard.shard_id] = shard
            if len(found) == len(wanted):
                break
    return found


def _fetch(source: ObjectStore, shards: dict[str, Shard], place: ImageRef) -> Fetched:
    try:
        listed = _object_of(shards.get(place.shard_id), place)
        return read_labelled(source, listed, place)
    except LabelfleetError as exc:
        return exc


def read_labelled(source: ObjectStore, listed: StoredObject, place: ImageRef) -> bytes:
    """Return the bytes of an image that lies in an object as it is.

    Raises:
        ObjectChanged: the object is not the one listed, and the bytes are not those labelled.
        StorageError: it cannot be read.
    """
    where = listed.key, place.offset or 0, place.nbytes
    try:
        body = source.get_range(*where, if_match=listed.etag)
    except ObjectChanged as changed:
        try:
            body = as_labelled(source.get_range(*where), place.image_id, place.sha256)
        except LabelfleetError:
            raise changed from None
        if not has_digest(body, place):
            raise
        return body
    return as_labelled(body, place.image_id, place.sha256)


def has_digest(body: bytes, place: ImageRef) -> bool:
    """Return whether bytes, a frame's as ``as_labelled`` has them, are those that were labelled."""
    return hashlib.sha256(body).hexdigest() == place.sha256


def _object_of(shard: Shard | None, place: ImageRef) -> StoredObject:
    if shard is not None and shard.kind == "tar":
        return shard.objects[0]
    for name in dict.fromkeys((place.image_id, file_id(place.image_id))):
        for listed in shard.objects if shard is not None else ():
            if name in image_ids_of(listed.key):
                return listed
    raise ObjectNotFound(f"{place.image_id!r} is not listed in shard {place.shard_id}")


def _from_compressed(
    source: ObjectStore, shard: Shard | None, wanted: Sequence[P]
) -> Iterator[tuple[P, Fetched]]:
    left = Wanted(wanted)
    places = {place.image_id: place for place in wanted}
    problem: LabelfleetError = StorageError(f"not found in {shard.key if shard else 'it'} again")
    try:
        if shard is None:
            raise ObjectNotFound(f"shard {wanted[0].shard_id} is not listed")
        try:
            for place, data in _unpacked(source, shard, left):
                yield places[place.image_id], data
        except ObjectChanged as changed:
            problem = changed
            now = replace(shard, objects=(source.head(shard.key),))
            for place, data in _unpacked(source, now, left):
                yield places[place.image_id], data if has_digest(data, place) else changed
    except LabelfleetError as exc:
        problem = exc
    for place in left.left:
        yield places[place.image_id], problem


def _unpacked(source: ObjectStore, shard: Shard, left: Wanted) -> Iterator[tuple[ImageRef, bytes]]:
    largest = max(place.nbytes for place in left.left)
    for one in read_shard(source, shard, max_image_bytes=largest):
        yield from left.of(one)
        if not left:
            return

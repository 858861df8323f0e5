"""Whether objects of another version than the labelled one still hold the labelled images.

Each object is read once and in order, up to its first wrong image, without the node cache.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from storage.errors import Interrupted, ObjectChanged, ObjectNotFound, SourceError
from storage.objects.prefetch import in_order
from storage.objects.protocols import ObjectStore
from storage.records import ImageRef, Shard, StoredObject
from storage.runs.image_bytes import has_digest
from storage.shards.frames import Wanted, as_labelled
from storage.shards.reading import read_shard

log = logging.getLogger("labelfleet")

_AT_ONCE = 8  # objects
_SPAN = 8 << 20  # bytes of an object that are read by one request, unless an image is larger
_GAP = 1 << 20  # unwanted bytes between two images that cost less than another request
_EVERY_S = 10.0
# Not ShortRead: how far an object reaches is known, so it means that replies were cut.
_OTHER_CONTENT = (ObjectChanged, ObjectNotFound, SourceError)


@dataclass(frozen=True, slots=True)
class Suspect:
    """An object that has another version now.

    Attributes:
        listed: as it was labelled; ``now``: as it is.
        shard: the compressed tar that it was; None: images lie in it as they are.
        places: its labelled images.
    """

    listed: StoredObject
    now: StoredObject
    shard: Shard | None
    places: Sequence[ImageRef]


class Comparison:
    """Compares objects with the digests that were labelled, a few at once.

    Args:
        objects: how many there are; ``nbytes``: of their labelled images. For the log lines, one
            at the start and then one every ten seconds.
    """

    def __init__(self, source: ObjectStore, objects: int, nbytes: int) -> None:
        self._source, self._objects, self._nbytes = source, objects, nbytes
        self._objects_done = self._nbytes_done = 0
        self._told_s = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def results(
        self, suspects: Iterable[Suspect]
    ) -> Generator[tuple[StoredObject, bool], None, None]:
        """Yield each object as it is now, and whether all its images are those labelled.

        An object with a wrong image is not read further.

        Raises:
            StorageError: an object cannot be read, so that nothing is known about it.
        """
        log.warning(
            "%d objects of %s have another version than when they were labelled: reading their "
            "images, %s bytes, to see whether they are the same",
            self._objects, self._source.url, f"{self._nbytes:,}",
        )  # fmt: skip
        # An object's bytes are held for a span or an image at a time, whatever its size.
        found = in_order(suspects, self._looked_at, readers=_AT_ONCE)
        try:
            with closing(found):
                yield from found
        finally:
            self._stop.set()  # after an error, the others are not read to their ends

    def _looked_at(self, one: Suspect) -> tuple[StoredObject, bool]:
        try:
            same = self._is_same(one)
        except _OTHER_CONTENT:
            same = False
        self._count(objects=1)
        return one.now, same

    def _is_same(self, one: Suspect) -> bool:
        if one.shard is not None:
            return self._is_same_packed(replace(one.shard, objects=(one.now,)), one.places)
        if one.listed.nbytes == one.places[0].nbytes != one.now.nbytes:
            return False  # a file, which has grown or shrunk
        for places in _spans(one.places):
            if self._stop.is_set():
                raise Interrupted(f"stopped while comparing {one.now.key}")
            start = places[0].offset or 0
            end = max((place.offset or 0) + place.nbytes for place in places)
            if end > one.now.nbytes:
                return False
            body = self._source.get_range(one.now.key, start, end - start, if_match=one.now.etag)
            for place in places:
                at = (place.offset or 0) - start
                file = body[at : at + place.nbytes]
                if not has_digest(as_labelled(file, place.image_id, place.sha256), place):
                    return False
                self._count(nbytes=place.nbytes)
        return True

    def _is_same_packed(self, now: Shard, places: Sequence[ImageRef]) -> bool:
        left = Wanted(places)
        largest = max(place.nbytes for place in places)
        abort = self._stop.is_set
        for record in read_shard(self._source, now, max_image_bytes=largest, abort=abort):
            for place, data in left.of(record):
                if not has_digest(data, place):
                    return False
                self._count(nbytes=place.nbytes)
            if not left:
                return True
        return False

    def _count(self, *, objects: int = 0, nbytes: int = 0) -> None:
        with self._lock:
            self._objects_done += objects
            self._nbytes_done += nbytes
            now_s = time.monotonic()
            if now_s - self._told_s < _EVERY_S:
                return
            self._told_s = now_s
            done, of = f"{self._nbytes_done:,}", f"{self._nbytes:,}"
            objects = self._objects_done
        log.warning(
            "compared %d of %d objects of %s, %s of %s bytes",
            objects, self._objects, self._source.url, done, of,
        )  # fmt: skip


def _spans(places: Sequence[ImageRef]) -> Iterator[list[ImageRef]]:
    """Yield images that lie close to each other, in the order of their offsets."""
    span: list[ImageRef] = []
    start = end = 0
    for place in sorted(places, key=lambda place: place.offset or 0):
        offset = place.offset or 0
        behind = max(end, offset + place.nbytes)
        if span and (offset - end > _GAP or behind - start > _SPAN):
            yield span
            span = []
        if not span:
            start, behind = offset, offset + place.nbytes
        span.append(place)
        end = behind
    if span:
        yield span

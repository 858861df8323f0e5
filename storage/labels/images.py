"""The image bytes of a label version, in any order, through a bounded cache of this machine.

A tar of which a good part is used is copied whole, in the background, while its images are still
read one by one; loose images are kept as they are read. Sources on this machine are read in
place. A compressed tar, where offsets do not help, is unpacked into the cache once.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from itertools import groupby
from queue import SimpleQueue
from typing import BinaryIO

from storage.errors import ConfigError, LabelfleetError, SourceError, StorageError
from storage.labels.copied import Comparison, Suspect
from storage.labels.objects import objects_now, objects_of
from storage.labels.stream import LabelIndex
from storage.objects.os_errors import from_os_error
from storage.objects.protocols import ObjectStore
from storage.records import ImageRef, StoredObject
from storage.runs.image_bytes import has_digest, shards_of
from storage.runs.manifest import Manifest
from storage.shards.frames import as_labelled
from storage.shards.node_cache import NodeCache
from storage.urls import parse_url

log = logging.getLogger("labelfleet")

_PAYS = 0.25  # a tar is copied whole if at least this share of its bytes is used
_FILLERS = 2
_CHUNK = 1 << 20
_NAMED = 3
_SAME = b"same"


class StreamImages:
    """Reads the images of a ``LabelIndex`` by number. Safe to use from several threads.

    Args:
        manifest: the run; ``source``: its images.
        index: the images that are read.
        cache: None: every image is read from the source each time.
        taken: bytes of the cache that other sources of the same training need.

    Attributes:
        needs: bytes of the cache that its copies take.

    Raises:
        ConfigError: the cache cannot hold the largest shard.
        SourceError: an image is not listed by the run any more.
    """

    def __init__(
        self,
        manifest: Manifest,
        source: ObjectStore,
        index: LabelIndex,
        cache: NodeCache | None,
        taken: int = 0,
    ) -> None:
        self._source, self._index, self._run = source, index, manifest.url
        shards = shards_of(manifest, index.shard_ids())
        self._objects, self._packed = objects_of(index, shards, manifest.url)
        self._cache = cache
        self.needs = 0
        self._copied = self._admitted(cache, taken)
        self._fillers: list[threading.Thread] = []
        self._asked: set[str] = set()
        self._orders: SimpleQueue[StoredObject] = SimpleQueue()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Compare each object with its listing, before anything is spent.

        An object of another version, such as one that was copied back with another time, is taken
        as it is now if all its images have the digests that were labelled. For that they are read,
        once on a machine with a cache.

        Raises:
            SourceError: objects are gone or changed, naming the first of them.
            StorageError: the source does not answer, or not to us.
        """
        expected = {one.key: one for one in self._objects}
        there = objects_now(self._source, expected)
        other = {
            key: now
            for key, now in there.items()
            if (now.nbytes, now.etag) != (expected[key].nbytes, expected[key].etag)
        }
        changed = self._changed(other) if other else set()
        wrong = [
            f"{key} changed" if key in there else f"{key} is gone"
            for key in expected
            if key in changed or key not in there
        ]
        if wrong:
            raise SourceError(
                f"{len(wrong)} of {len(expected)} objects of {self._source.url} are not what was "
                f"labelled in {self._run}: {'; '.join(wrong[:_NAMED])}",
                hint="restore them, or label again: `labelfleet run`, then `labelfleet decide`",
            )

    def _changed(self, other: Mapping[str, StoredObject]) -> set[str]:
        """Take objects as they are now; return the keys of those that hold another image."""
        numbers = [n for n, listed in enumerate(self._objects) if listed.key in other]
        numbers.sort(key=lambda n: self._objects[n].key)
        results = self._compared(numbers, other)
        for number in numbers:
            key = self._objects[number].key
            if results[key]:
                self._objects[number] = other[key]
        for key, packed in self._packed.items():
            if results.get(key):
                packed.shard = replace(packed.shard, objects=(other[key],))
        return {key for key, same in results.items() if not same}

    def _compared(
        self, numbers: Sequence[int], other: Mapping[str, StoredObject]
    ) -> dict[str, bool]:
        """Return of each object whether its images are those labelled.

        Processes of one machine that ask at once do so one after the other: the first reads the
        objects, and leaves a note for the others.
        """
        note, cache = self._note(other), self._cache
        with ExitStack() as turn:
            if cache is not None:
                with suppress(OSError):  # a folder that cannot be written
                    turn.enter_context(cache.turn(note))
                if cache.read(note, 0, len(_SAME)) == _SAME:
                    return dict.fromkeys(other, True)
            nbytes = sum(self._index.nbytes(n) for n in numbers)
            compared = Comparison(self._source, len(other), nbytes)
            with closing(compared.results(self._suspects(numbers, other))) as found:
                results = {now.key: same for now, same in found}
            if cache is not None and all(results.values()):
                _kept(cache, note, _SAME)
            return results

    def _note(self, other: Mapping[str, StoredObject]) -> str:
        """Name what was found about these labels and these versions of objects."""
        versions = sorted((key, now.nbytes, now.etag) for key, now in other.items())
        digest = hashlib.sha256(repr(versions).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{self._source.url}\0copied\0{self._index.digest}\0{digest}"

    def _suspects(
        self, numbers: Sequence[int], other: Mapping[str, StoredObject]
    ) -> Iterator[Suspect]:
        for key, group in groupby(numbers, lambda n: self._objects[n].key):
            of_it = list(group)
            packed = self._packed.get(key)
            yield Suspect(
                self._objects[of_it[0]],
                other[key],
                None if packed is None else packed.shard,
                [self._index.place(n) for n in of_it],
            )

    def read(self, number: int) -> bytes:
        """Return an image's bytes, checked by their digest.

        Raises:
            SourceError: it is gone, not the one that was labelled, or cannot be read.
        """
        place = self._index.place(number)
        listed = self._objects[number]
        try:
            body = self._fetched(place, listed)
            return self._checked(as_labelled(body, place.image_id, place.sha256), place, listed)
        except LabelfleetError as exc:
            raise SourceError(
                f"{place.image_id} of {self._source.url}: {exc.message}",
                # An outage comes with advice of its own.
                hint=exc.hint or "it was there when the training began: has it changed since?",
            ) from exc

    def _checked(self, body: bytes, place: ImageRef, listed: StoredObject) -> bytes:
        if _same(body, place):
            return body
        if self._cache is not None:  # a copy may have been damaged on disk
            self._cache.drop(self._name(listed))
            again = as_labelled(self._ranged(place, listed), place.image_id, place.sha256)
            if _same(again, place):
                return again
        raise StorageError("its bytes are not those that were labelled")

    def _fetched(self, place: ImageRef, listed: StoredObject) -> bytes:
        if listed.key in self._packed:
            return self._unpacked(place, listed)
        cache, offset = self._cache, place.offset or 0
        if cache is None or listed.key not in self._copied:
            return self._source.get_range(listed.key, offset, place.nbytes, if_match=listed.etag)
        found = cache.read(self._name(listed), offset, place.nbytes)
        if found is not None:
            return found
        body = self._source.get_range(listed.key, offset, place.nbytes, if_match=listed.etag)
        if listed.nbytes == place.nbytes:
            _kept(cache, self._name(listed), body)
        else:
            self._order(listed)
        return body

    def _ranged(self, place: ImageRef, listed: StoredObject) -> bytes:
        if listed.key in self._packed:
            return self._unpacked(place, listed)
        offset = place.offset or 0
        return self._source.get_range(listed.key, offset, place.nbytes, if_match=listed.etag)

    def _name(self, listed: StoredObject) -> str:
        packed = self._packed.get(listed.key)
        of = "" if packed is None else packed.digest
        return f"{self._source.url}\0{listed.key}\0{listed.etag}\0{listed.nbytes}\0{of}"

    def _admitted(self, cache: NodeCache | None, taken: int) -> set[str]:
        """Return the keys whose objects are copied whole: what pays most, up to the cache's size.

        The choice is made once: if objects pushed each other out under a full shuffle, each read
        could cost a whole tar.
        """
        if cache is None:
            if self._packed:
                raise ConfigError(
                    f"{min(self._packed)} is compressed, so its images have to be unpacked",
                    hint="give the training a `cache`",
                )
            return set()
        used: dict[str, int] = {}
        objects: dict[str, StoredObject] = {}
        for number, listed in enumerate(self._objects):
            used[listed.key] = used.get(listed.key, 0) + self._index.nbytes(number)
            objects[listed.key] = listed
        sizes = {
            key: used[key] if key in self._packed else listed.nbytes
            for key, listed in objects.items()
        }
        if _is_local(self._source.url):
            sizes = {key: size for key, size in sizes.items() if key in self._packed}
        largest = max(sizes, key=lambda key: sizes[key], default=None)
        if largest is not None and sizes[largest] > cache.nbytes:
            raise ConfigError(
                f"cache.size is {cache.nbytes:,} bytes, less than the shard {largest} of "
                f"{self._source.url} with {sizes[largest]:,}",
                hint="raise cache.size, or leave the cache out: `cache: null`",
            )
        unpacked = sum(sizes[key] for key in self._packed)
        if self._packed and unpacked + taken > cache.nbytes:
            log.warning(
                "the compressed tars of %s hold %s bytes of images, and cache.size has %s left for "
                "them: tars will be unpacked again and again, which is slow; raise cache.size, or "
                "pack the images into tars without compression",
                self._source.url, f"{unpacked:,}", f"{max(0, cache.nbytes - taken):,}",
            )  # fmt: skip
        copied, self.needs = set(self._packed), unpacked
        left = cache.nbytes - taken - unpacked
        for key in sorted(sizes, key=lambda key: -used[key] / max(1, sizes[key])):
            if key in copied or used[key] < _PAYS * sizes[key] or sizes[key] > left:
                continue
            copied.add(key)
            self.needs += sizes[key]
            left -= sizes[key]
        return copied

    def _order(self, listed: StoredObject) -> None:
        """Have a tar copied in the background, once."""
        with self._lock:
            if listed.key in self._asked:
                return
            self._asked.add(listed.key)
            self._orders.put(listed)
            if len(self._fillers) < _FILLERS:
                thread = threading.Thread(target=self._fill, name="node-cache", daemon=True)
                self._fillers.append(thread)
                thread.start()

    def _fill(self) -> None:
        while True:
            self.copy(self._orders.get())

    def copy(self, listed: StoredObject) -> None:
        """Copy a tar into the cache; where that fails its images are read one by one."""
        if self._cache is None:
            return

        def write(file: BinaryIO) -> None:
            with self._source.stream(listed.key, if_match=listed.etag) as stream:
                while chunk := stream.read(_CHUNK):
                    file.write(chunk)

        try:
            self._cache.fill(self._name(listed), listed.nbytes, write)
        except (LabelfleetError, OSError):
            return

    def _unpacked(self, place: ImageRef, listed: StoredObject) -> bytes:
        packed, cache = self._packed[listed.key], self._cache
        if cache is None:
            raise StorageError("it lies in a compressed tar, which needs a cache")
        for _ in range(2):  # another process may make room between filling and reading
            offset = packed.offsets[place.image_id]
            found = cache.read(self._name(listed), offset, place.nbytes)
            if found is not None:
                return found
            try:
                cache.fill(
                    self._name(listed),
                    packed.nbytes,
                    lambda file: packed.write(self._source, file),
                    wait=True,
                )
            except OSError as exc:
                raise from_os_error(exc, str(cache.folder)) from exc
        raise StorageError("the cache does not keep it; raise cache.size")


def _kept(cache: NodeCache, name: str, body: bytes) -> None:
    try:
        cache.keep(name, body)
    except OSError:
        return  # a full disk costs speed, not the training


def _same(body: bytes, place: ImageRef) -> bool:
    return not place.sha256 or has_digest(body, place)


def _is_local(url: str) -> bool:
    return parse_url(url).scheme == "file"

"""The objects that a label version's images lie in: as the run listed them, and as they are now."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from storage.errors import ObjectNotFound, SourceError, StorageError
from storage.labels.stream import LabelIndex
from storage.objects.prefetch import in_order
from storage.objects.protocols import ObjectStore
from storage.records import ImageRef, Shard, StoredObject, image_ids_of
from storage.shards.frames import Wanted, file_id
from storage.shards.reading import read_shard

_CHECKERS = 16
_HEADS = 1000  # objects that are looked at one by one; of more, the source is listed


class Packed:
    """The images of a compressed tar, one after the other.

    Attributes:
        shard: the tar, in the version that is read.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._places: list[ImageRef] = []
        self.offsets: dict[str, int] = {}
        self.nbytes = 0

    def add(self, place: ImageRef) -> None:
        """Give an image its place."""
        self.offsets[place.image_id] = self.nbytes
        self._places.append(place)
        self.nbytes += place.nbytes

    @property
    def digest(self) -> str:
        """16 hex digits of what lies where."""
        return hashlib.sha256(repr(self.offsets).encode()).hexdigest()[:16]

    def write(self, source: ObjectStore, file: BinaryIO) -> None:
        """Write all of them. Raises SourceError where one is not in the tar."""
        left = Wanted(self._places)
        largest = max(place.nbytes for place in self._places)
        for one in read_shard(source, self.shard, max_image_bytes=largest):
            for place, _ in left.of(one):
                file.seek(self.offsets[place.image_id])
                file.write(one.data or b"")
            if not left:
                return
        name = min(place.image_id for place in left.left)
        raise SourceError(f"{name} is not in {self.shard.key} any more")


def objects_of(
    index: LabelIndex, shards: Mapping[str, Shard], run: str
) -> tuple[list[StoredObject], dict[str, Packed]]:
    """Return the object of every image as it was listed, and the compressed tars by key.

    Raises SourceError where an image is not listed any more.
    """
    objects: list[StoredObject] = []
    packed: dict[str, Packed] = {}
    loose: dict[str, dict[str, StoredObject]] = {}
    for number in range(len(index)):
        place = index.place(number)
        shard = shards.get(place.shard_id)
        found: StoredObject | None = None
        if shard is not None and shard.kind == "tar":
            found = shard.objects[0]
            if place.offset is None:
                packed.setdefault(found.key, Packed(shard)).add(place)
        elif shard is not None:
            if shard.shard_id not in loose:
                loose[shard.shard_id] = {i: o for o in shard.objects for i in image_ids_of(o.key)}
            by_id = loose[shard.shard_id]
            found = by_id.get(place.image_id) or by_id.get(file_id(place.image_id))
        if found is None:
            raise SourceError(
                f"{place.image_id} is in the labels of {run}, but not in its listing",
                hint="`labelfleet verify` says what the run lacks",
            )
        objects.append(found)
    return objects, packed


def objects_now(
    source: ObjectStore, expected: Mapping[str, StoredObject]
) -> dict[str, StoredObject]:
    """Return the objects of these keys as they are now; those that are gone are left out."""

    def head(key: str) -> StoredObject | None:
        try:
            return source.head(key)
        except ObjectNotFound:
            return None

    if len(expected) > _HEADS:
        try:
            prefix = _common(sorted(expected))
            return {one.key: one for one in source.list(prefix) if one.key in expected}
        except StorageError:
            pass  # a web server that lists nothing
    # The first error ends it: a server that is down is not asked for each of them.
    found = in_order(expected, head, readers=_CHECKERS)
    return {one.key: one for one in found if one is not None}


def _common(keys: Sequence[str]) -> str:
    first, last = keys[0], keys[-1]
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first[:length] if length is not None else first

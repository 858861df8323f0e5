"""What changed between the live objects of a run and a fresh listing, both ordered by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from storage.records import ShardKind, StoredObject
from storage.runs.generations import key_bytes

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class ListingChange:
    """The changes from the earlier listings to a new one, in objects.

    ``returned`` counts those of the added and changed objects that an earlier listing dropped and
    that came back unchanged: they and their rows are back in their old shards.
    """

    generation: int
    shards_added: int
    added: int
    changed: int
    deleted: int
    returned: int = 0


@dataclass(frozen=True, slots=True)
class ListingDrop:
    """The objects that a listing is about to drop.

    Attributes:
        known: number of live objects before the listing.
        deleted: number of them that are missing from it.
        folders: number of first-level folders missing entirely.
        examples: the first of these folders.
    """

    known: int
    deleted: int
    folders: int
    examples: tuple[str, ...]


class Known(NamedTuple):
    """A live object and its shard; ``key`` is bytes, for ordering."""

    key: bytes
    shard_id: str
    kind: ShardKind
    listed: StoredObject


class DropCount:
    """Counts known and deleted objects, and the first-level folders that a listing lacks.

    It sees both listings ordered by key, so that a folder's objects come together.
    """

    def __init__(self) -> None:
        self._known = self._deleted = self._folders = 0
        self._examples: list[str] = []
        self._folder: bytes | None = None
        self._is_known = self._is_there = False

    def see(self, new: StoredObject | None, old: Known | None) -> None:
        """Count one key."""
        self._known += old is not None
        self._deleted += new is None
        key = old.key if old is not None else b"" if new is None else key_bytes(new)
        folder = key.partition(b"/")[0] if b"/" in key else None
        if folder != self._folder:
            self._end()
            self._folder = folder
        self._is_known = self._is_known or old is not None
        self._is_there = self._is_there or new is not None

    def _end(self) -> None:
        if self._folder is not None and self._is_known and not self._is_there:
            self._folders += 1
            if len(self._examples) < _EXAMPLES:
                self._examples.append(self._folder.decode("utf-8", "backslashreplace"))
        self._is_known = self._is_there = False

    def result(self) -> ListingDrop:
        """Return the counts, after the last key."""
        self._end()
        self._folder = None
        return ListingDrop(self._known, self._deleted, self._folders, tuple(self._examples))


def is_same(new: StoredObject, old: Known) -> bool:
    """Return whether an object is the version that was listed."""
    return (new.nbytes, new.etag) == (old.listed.nbytes, old.listed.etag)


def joined(
    listed: Iterator[StoredObject], known: Iterator[Known]
) -> Iterator[tuple[StoredObject | None, Known | None]]:
    """Join two streams ordered by key: what either lacks is None."""
    new, old = next(listed, None), next(known, None)
    while new is not None or old is not None:
        if old is None:
            yield new, None
            new = next(listed, None)
            continue
        key = None if new is None else key_bytes(new)
        if key is not None and key < old.key:
            yield new, None
            new = next(listed, None)
        elif key is None or key > old.key:
            yield None, old
            old = next(known, None)
        else:
            yield new, old
            new, old = next(listed, None), next(known, None)

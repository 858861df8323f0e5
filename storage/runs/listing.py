"""The shards of a run: frozen listings under source/, in generations.

``source/<n>.parquet`` holds what the n-th listing added and dropped. Existing groups are
never regrouped: new images form new shards, a changed image is dropped from its old shard and joins
a new one, a deleted one is dropped. An object is live if it was added and not dropped since. An
image that comes back unchanged returns to its shard: the shard is added a second time, which undoes
its drops, and its existing labels count again.

Both the store's listing and each generation are ordered by key, so a later listing is compared
with all earlier ones by a merge join, in memory that does not grow with the source.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import ObjectStore
from storage.parquet.files import read_metadata
from storage.records import SHARD_KINDS, Shard, ShardKind, StoredObject
from storage.runs.generations import (
    OPS,
    PART_NBYTES,
    Generations,
    GenerationWriter,
    generation_key,
    generation_keys,
    key_bytes,
    move_key,
    moves_of,
)
from storage.runs.listing_changes import (
    DropCount,
    Known,
    ListingChange,
    ListingDrop,
    is_same,
    joined,
)

Version = tuple[str, int, str]  # a listed object: key, size, etag


class Listing:
    """The generations of one run's source. Not thread-safe.

    Args:
        store: the run's output.
        part_nbytes: part size of a new generation, see storage/runs/generations.py.
    """

    def __init__(self, store: ObjectStore, *, part_nbytes: int = PART_NBYTES) -> None:
        self._store, self._part_nbytes = store, part_nbytes
        self._read = Generations(store, store.url)
        self._generations: list[str] | None = None
        self._dropped: dict[str, set[str]] | None = None
        self._moved: int | None = None
        self._added_again: set[str] = set()  # shard ids that were added, dropped and added

    def generations(self) -> list[str]:
        """Return keys of the listings, oldest first. Raises StorageError where one is missing."""
        if self._generations is None:
            self._generations = generation_keys(self._store, self._store.url)
        return self._generations

    @property
    def moved(self) -> bool:
        """Whether the source has moved: shards keep their ids, but their objects have new
        versions, so the ids cannot be recomputed from them."""
        return self._moves() > 0

    def _moves(self) -> int:
        if self._moved is None:
            self._moved = moves_of(self._store)
        return self._moved

    def moved_to(self, new: Mapping[Version, str], url: str) -> None:
        """Record that the source has moved to a place where its objects have other etags.

        The generations are rewritten with the new etags; shards keep their ids, so their rows
        remain valid. The old generations stay but no longer count.

        Args:
            new: etags at the new place, by listed version; others are unchanged.
            url: the new place.
        """
        moves = self._moves() + 1
        with tempfile.TemporaryDirectory(prefix="labelfleet-") as folder:
            for number, key in enumerate(self.generations()):
                if self._is_there(generation_key(number, moves)):
                    self._store.delete(generation_key(number, moves))  # of an interrupted move
                writer = GenerationWriter(
                    self._store,
                    number,
                    Path(folder),
                    part_nbytes=self._part_nbytes,
                    moves=moves,
                )
                for op in OPS:
                    for shard in self._read.shards(key, op):
                        objects = [_moved(o, new) for o in shard.objects]
                        writer.write(op, shard.shard_id, shard.kind, objects)
                writer.commit()
        self._store.create(move_key(moves), json_record({"url": url}))
        self._generations = self._dropped = self._moved = None

    def _is_there(self, key: str) -> bool:
        return any(o.key == key for o in self._store.list(key))

    def place(self) -> str | None:
        """Return the source's URL since its last move; None if it never moved."""
        moves = self._moves()
        if not moves:
            return None
        return str(read_record(self._store, move_key(moves), lambda fields: fields["url"]))

    def parts(self) -> list[str]:
        """Return the keys of all objects of the generations."""
        return [part for key in self.generations() for part in self._read.parts(key)]

    def unsealed(self) -> int:
        """Count the listing objects without a seal, which older versions wrote."""
        heads = (self._store.head(key) for key in self.parts())
        return sum(not read_metadata(self._store, head, required=False)[1] for head in heads)

    def dropped(self) -> dict[str, set[str]]:
        """Return the tombstoned object keys by shard id."""
        if self._dropped is None:
            dropped: dict[str, set[str]] = {}
            again: set[str] = set()
            for key in self.generations():
                self._apply_drops(key, dropped, again)
            # Assigned last: after an error the set would be incomplete.
            self._dropped, self._added_again = dropped, again
        return self._dropped

    def _apply_drops(self, key: str, dropped: dict[str, set[str]], again: set[str]) -> None:
        if dropped:
            for shard_id in self._read.ids(key, "add"):
                if dropped.pop(shard_id, None) is not None:
                    again.add(shard_id)
        for shard in self._read.shards(key, "drop"):
            dropped.setdefault(shard.shard_id, set()).update(o.key for o in shard.objects)

    def all_shards(self, *, skip: Set[str] = frozenset()) -> Iterator[Shard]:
        """Yield every shard that was ever listed and is not in ``skip``, each once, as it was
        listed, oldest generation first."""
        self.dropped()
        repeats: set[str] = set()
        for key in self.generations():
            for shard in self._read.shards(key, "add", skip=skip):
                if not self._is_repeat(shard.shard_id, repeats):
                    yield shard

    def all_ids(self) -> Iterator[str]:
        """Yield ids of every shard that was ever listed, each once, without their objects."""
        self.dropped()
        repeats: set[str] = set()
        for key in self.generations():
            for shard_id in self._read.ids(key, "add"):
                if not self._is_repeat(shard_id, repeats):
                    yield shard_id

    def added(self) -> Iterator[set[str]]:
        """Yield ids of the live shards that each listing was the first to add, oldest listing
        first."""
        live, seen = set(self.live_ids()), set[str]()
        for key in self.generations():
            ids = set(self._read.ids(key, "add")) - seen
            seen |= ids
            yield ids & live

    def _is_repeat(self, shard_id: str, repeats: set[str]) -> bool:
        if shard_id not in self._added_again:
            return False
        seen = shard_id in repeats
        repeats.add(shard_id)
        return seen

    def _repeats(self) -> dict[str, set[str]]:
        """Return ids of shards that an earlier listing added already, by the listing that repeats
        them."""
        self.dropped()
        seen: set[str] = set()
        repeats: dict[str, set[str]] = {}
        for key in self.generations() if self._added_again else ():
            again = self._added_again.intersection(self._read.ids(key, "add"))
            repeats[key] = again & seen
            seen |= again
        return repeats

    def returned(self, shard_id: str) -> bool:
        """Return whether a shard was once dropped entirely and is live again."""
        self.dropped()
        return shard_id in self._added_again

    def live_shards(self, *, skip: Set[str] = frozenset()) -> Iterator[Shard]:
        """Yield shards with at least one live object, as they were listed (the id covers all
        objects); those in ``skip`` are left out."""
        dropped = self.dropped()
        for shard in self.all_shards(skip=skip):
            gone = dropped.get(shard.shard_id)
            if gone is None or any(o.key not in gone for o in shard.objects):
                yield shard

    def count(self) -> int:
        """Return the number of live shards."""
        return sum(1 for _ in self.live_ids())

    def live_ids(self) -> Iterator[str]:
        """Yield the ids of live shards; read objects only of shards with drops."""
        if not self.dropped():
            yield from self.all_ids()
            return
        whole = set(self.all_ids()) - self.dropped().keys()
        partly = {shard.shard_id for shard in self.live_shards(skip=whole)}
        yield from (i for i in self.all_ids() if i in whole or i in partly)

    def refresh(
        self,
        listed: Iterable[StoredObject],
        group: Callable[[Iterable[StoredObject]], Iterator[Shard]],
        guard: Callable[[], None] = lambda: None,
        *,
        check_drop: Callable[[ListingDrop], None] = lambda drop: None,
        again: Container[str] = frozenset(),
    ) -> ListingChange:
        """Compare a fresh listing with what is known; write the difference as a new generation.

        Args:
            listed: every object to label, ordered by key (UTF-8 bytes).
            group: turns objects, in that order, into shards.
            guard: called before the generation is committed; raises when it must not be, because
                the run's lock was lost meanwhile.
            check_drop: sees what would be dropped before anything is committed; may raise.
            again: keys of objects that leave their shards for new ones although they are as they
                were: what was recorded of them there no longer holds.

        Returns:
            What changed; ``generation`` is the last one, new only if something changed.
        """
        number = len(self.generations())
        with tempfile.TemporaryDirectory(prefix="labelfleet-") as folder:
            writer = GenerationWriter(
                self._store,
                number,
                Path(folder),
                part_nbytes=self._part_nbytes,
                moves=self._moves(),
            )
            drop = DropCount()
            change = self._write_difference(writer, number, listed, group, drop, again)
            check_drop(drop.result())
            if not writer.count:
                return change
            guard()
            self.generations().append(writer.commit())
        self._dropped = None
        return change

    def _write_difference(
        self,
        writer: GenerationWriter,
        number: int,
        listed: Iterable[StoredObject],
        group: Callable[[Iterable[StoredObject]], Iterator[Shard]],
        drop: DropCount,
        again: Container[str],
    ) -> ListingChange:
        drops: dict[tuple[str, ShardKind], list[StoredObject]] = {}
        back: dict[str, set[str]] = {}  # keys by the shard that they return to
        gone = self._dropped_versions()
        added = changed = deleted = 0

        def fresh() -> Iterator[StoredObject]:
            nonlocal added, changed, deleted
            for new, old in self.joined(listed):
                drop.see(new, old)
                moves = new is not None and new.key in again
                if new is not None and old is not None and is_same(new, old) and not moves:
                    continue
                if old is not None:
                    drops.setdefault((old.shard_id, old.kind), []).append(old.listed)
                    deleted += new is None
                    changed += new is not None
                if new is None:
                    continue
                added += old is None
                shard_id = None if moves else gone.get((new.key, new.nbytes, new.etag))
                if shard_id is None:
                    yield new
                else:
                    back.setdefault(shard_id, set()).add(new.key)

        for shard in group(fresh()):
            writer.write("add", shard.shard_id, shard.kind, shard.objects)
        shards_added = writer.count
        self._write_returns(writer, back, drops)
        for (shard_id, kind), objects in drops.items():
            writer.write("drop", shard_id, kind, objects)
        newest = number if writer.count else number - 1
        returned = sum(len(keys) for keys in back.values())
        return ListingChange(newest, shards_added, added, changed, deleted, returned)

    def _dropped_versions(self) -> dict[tuple[str, int, str], str]:
        """Return shard ids by (key, size, etag) of what is dropped now."""
        dropped = self.dropped()
        if not dropped:
            return {}
        return {
            (o.key, o.nbytes, o.etag): shard.shard_id
            for key in self.generations()
            for shard in self._read.shards(key, "drop")
            for o in shard.objects
            if o.key in dropped.get(shard.shard_id, ())
        }

    def _write_returns(
        self,
        writer: GenerationWriter,
        back: dict[str, set[str]],
        drops: dict[tuple[str, ShardKind], list[StoredObject]],
    ) -> None:
        """Add the shards to which objects return again. That makes all of their objects live, so
        those still missing are dropped in the same generation."""
        if not back:
            return
        dropped = self.dropped()
        written: set[str] = set()
        for key in self.generations():
            for shard in self._read.shards(key, "add"):
                keys = back.get(shard.shard_id)
                if keys is None or shard.shard_id in written:
                    continue
                written.add(shard.shard_id)
                writer.write("add", shard.shard_id, shard.kind, shard.objects)
                away = dropped.get(shard.shard_id, set()) - keys
                still = [o for o in shard.objects if o.key in away]
                if still:
                    drops.setdefault((shard.shard_id, shard.kind), []).extend(still)

    def dropped_by(self) -> dict[str, str]:
        """Return, by shard id, the key of the last listing that dropped something from the
        shard."""
        return {
            shard_id: key for key in self.generations() for shard_id in self._read.ids(key, "drop")
        }

    def joined(
        self, listed: Iterable[StoredObject]
    ) -> Iterator[tuple[StoredObject | None, Known | None]]:
        """Yield a fresh listing beside the live objects, by key: (new, None) was not there before,
        (None, known) is gone, and what has both may have changed (see ``is_same``)."""
        return joined(iter(listed), self._known())

    def doubled(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, shard id, other shard id) of objects that are live in two shards, which is
        damage."""
        before: Known | None = None
        for known in self._live_by_key():
            same = before is not None and known.key == before.key
            if same and before is not None and known.shard_id != before.shard_id:
                yield known.listed.key, before.shard_id, known.shard_id
            before = known

    def _known(self) -> Iterator[Known]:
        before: bytes | None = None
        for known in self._live_by_key():
            if known.key != before:  # a shard that was added again is in two generations
                yield known
            before = known.key

    def _live_by_key(self) -> Iterator[Known]:
        """Yield live objects ordered by key. A shard that was added again is read from the listing
        that added it first: returning objects are not in the order of the later listing."""
        dropped = self.dropped()
        repeats = self._repeats()

        def one(key: str, kind: ShardKind) -> Iterator[Known]:
            for shard in self._read.shards(key, "add", kind=kind, skip=repeats.get(key, set())):
                gone = dropped.get(shard.shard_id, ())
                for o in shard.objects:
                    if o.key not in gone:
                        yield Known(key_bytes(o), shard.shard_id, shard.kind, o)

        # Within a generation tars and groups of images interleave; each kind alone is ordered.
        streams = [one(key, kind) for key in self.generations() for kind in SHARD_KINDS]
        yield from heapq.merge(*streams, key=itemgetter(0))


def _moved(listed: StoredObject, new: Mapping[Version, str]) -> StoredObject:
    etag = new.get((listed.key, listed.nbytes, listed.etag))
    return listed if etag is None else replace(listed, etag=etag)

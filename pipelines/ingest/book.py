"""The records of an ingest at its destination: they let it continue without duplicates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.errors import AlreadyExists, ConfigError, ObjectNotFound, SourceError
from storage.objects.protocols import ObjectStore

FORMAT = 1
_AGAIN = re.compile(r"(\d{6,})\.(\d+)\.json")


@dataclass(frozen=True, slots=True)
class Failure:
    """An entry that could not be read: its number in the source, its name, where, and why."""

    entry: int
    name: str
    where: str
    error: str


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What went into one shard.

    Attributes:
        index: number of the shard.
        first, last: its entries are those numbered [first, last).
        images: entries that are in the tar; 0: no tar was written.
        image_nbytes: of these images.
        tar_nbytes, tar_sha256: of the tar.
        failures: the rest of the entries.
        entries: of a shard made of entries that failed before, their numbers; it covers no others,
            so ``first`` and ``last`` are equal.
    """

    index: int
    first: int
    last: int
    images: int
    image_nbytes: int
    tar_nbytes: int
    tar_sha256: str
    failures: tuple[Failure, ...]
    entries: tuple[int, ...] | None = None


class IngestBook:
    """The tars and records of one ingest.

    Args:
        store: the destination.
        name: of the shards.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name
        self._index = 0
        self._entry = 0
        self._again: dict[int, int] = {}  # how often a record was replaced, by its index

    def open(self, identity: Mapping[str, Any]) -> None:
        """Begin an ingest, or check that the one begun here is the same.

        Raises ConfigError naming what differs.
        """
        for listed in self._store.list(self._key("")):
            again = _AGAIN.fullmatch(listed.key.removeprefix(self._key("")))
            if again:
                index, times = int(again[1]), int(again[2])
                self._again[index] = max(times, self._again.get(index, 0))
        wanted = {"format": FORMAT, **identity}
        key = self._key("source.json")
        try:
            self._store.create(key, _pretty(wanted))
        except AlreadyExists:
            found = json.loads(self._store.get(key))
            differing = [k for k in wanted if found.get(k) != wanted[k]]
            if differing:
                told = ", ".join(f"{k} was {found.get(k)!r}, is {wanted[k]!r}" for k in differing)
                raise ConfigError(
                    f"{self._store.url} holds another ingest called {self._name}: {told}",
                    hint="ingest into another folder; or, if the source changed, only what is new",
                ) from None

    def records(self) -> Iterator[ShardRecord]:
        """Yield the records there are, in order."""
        while (record := self._read(self._index)) is not None:
            yield record
            self._advance(record)

    def next_index(self) -> int:
        """Number of the shard that has no record yet."""
        return self._index

    def next_entry(self) -> int:
        """Number of the first entry that is in no record."""
        return self._entry

    def has_tar(self, record: ShardRecord) -> bool:
        """Return whether a record's shard is finished.

        Raises SourceError when an object of another size is in its place.
        """
        if record.images == 0:
            return True
        try:
            found = self._store.head(self._tar_key(record.index))
        except ObjectNotFound:
            return False
        if found.nbytes != record.tar_nbytes:
            raise self._foreign(record.index)
        return True

    def write_record(self, record: ShardRecord) -> None:
        """Announce a shard. Of two ingests racing for it, the later one stops here."""
        if record.images and self._tar_exists(record.index):
            raise self._foreign(record.index)
        try:
            self._store.create(self._record_key(record.index), _pretty(_fields(record)))
        except AlreadyExists:
            if self._read(record.index) != record:  # otherwise ours, its reply was lost
                raise SourceError(
                    f"another ingest is writing {self._name} to {self._store.url}",
                    hint="wait for it to end, then run this one again",
                ) from None
        self._advance(record)

    def replace_record(self, record: ShardRecord) -> None:
        """Announce other contents for a shard that has a record and no tar: entries that it names
        cannot be read any more."""
        times = self._again.get(record.index, 0) + 1
        self._store.create(self._key(f"{record.index:06}.{times}.json"), _pretty(_fields(record)))
        self._again[record.index] = times

    def write_tar(self, record: ShardRecord, spool: Path) -> None:
        """Create a record's tar from the spool file.

        Raises SourceError when the bytes are not those the record announced.
        """
        if record.images == 0:
            return
        digest = hashlib.sha256()
        with spool.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        if digest.hexdigest() != record.tar_sha256:
            raise SourceError(
                f"the entries of {self._tar_key(record.index)} changed since they were first read",
                hint="ingest into another folder",
            )
        try:
            self._store.create(self._tar_key(record.index), spool)
        except AlreadyExists:
            if not self._same(record):
                raise self._foreign(record.index) from None

    def failures(self) -> dict[int, Failure]:
        """Return the entries that are in no shard, by number, after all records so far."""
        failed: dict[int, Failure] = {}
        for index in range(self._index):
            record = self._read(index)
            assert record is not None  # noqa: S101  written or read by this object before
            failed.update((failure.entry, failure) for failure in record.failures)
            for entry in record.entries or ():
                failed.pop(entry, None)
        return failed

    def write_errors(self) -> str:
        """Collect all failures, one JSON a line; returns the URL."""
        lines = [json.dumps(asdict(failure)) for _, failure in sorted(self.failures().items())]
        self._store.put(self._key("errors.jsonl"), "".join(f"{o}\n" for o in lines).encode())
        return f"{self._store.url}/{self._key('errors.jsonl')}"

    def _advance(self, record: ShardRecord) -> None:
        self._index, self._entry = record.index + 1, record.last

    def _read(self, index: int) -> ShardRecord | None:
        try:
            times = self._again.get(index)
            key = self._key(f"{index:06}.{times}.json") if times else self._record_key(index)
            fields = json.loads(self._store.get(key))
        except ObjectNotFound:
            return None
        failures = tuple(Failure(**failure) for failure in fields.pop("failures"))
        entries = fields.pop("entries", None)
        return ShardRecord(
            **fields, failures=failures, entries=None if entries is None else tuple(entries)
        )

    def _tar_exists(self, index: int) -> bool:
        try:
            self._store.head(self._tar_key(index))
        except ObjectNotFound:
            return False
        return True

    def _same(self, record: ShardRecord) -> bool:
        digest = hashlib.sha256()
        with self._store.stream(self._tar_key(record.index)) as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest() == record.tar_sha256

    def _foreign(self, index: int) -> ConfigError:
        return ConfigError(
            f"{self._store.url}/{self._tar_key(index)} exists and was not written by this ingest",
            hint="ingest into another folder; nothing is overwritten",
        )

    def _key(self, name: str) -> str:
        return f"{self._name}.ingest/{name}"

    def _record_key(self, index: int) -> str:
        return self._key(f"{index:06}.json")

    def _tar_key(self, index: int) -> str:
        return f"{self._name}-{index:06}.tar"


def _fields(record: ShardRecord) -> dict[str, Any]:
    fields = asdict(record)
    if record.entries is None:
        del fields["entries"]
    return fields


def _pretty(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1) + "\n").encode()

"""Ingest: images from a folder, a zip or a list of URLs into tar shards, byte for byte.

    <dest>/<name>-000000.tar            a shard: PAX tar, every time stamp 0, same input same bytes
    <dest>/<name>.ingest/source.json    what is ingested, how; created first, compared on a re-run
    <dest>/<name>.ingest/000000.json    which entries went into shard 0, and which could not
    <dest>/<name>.ingest/000000.1.json  replaces a record whose tar could not be made any more
    <dest>/<name>.ingest/errors.jsonl   all entries that could not be read, written at the end

A shard's record is created before its tar, so that after a kill the same entries make the same tar.
Entries that could not be read are tried again by the next call, which puts them into shards of
their own. A server that does not answer is not the fault of its images: after some in a row the
ingest stops, and the same command continues it. Everything but errors.jsonl is written by atomic
create and never again: nothing that lies in ``dest`` already is overwritten, and nothing is
deleted. A source that changed since its first ingest is refused, since its entries would no longer
be those of the records.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from pipelines.ingest.book import Failure, IngestBook, ShardRecord
from pipelines.ingest.entries import Entry, Source, survey
from pipelines.ingest.shard import Fetched, ShardInMaking, fetch
from pipelines.ingest.sources import open_source
from storage.errors import ConfigError, SourceEmpty, SourceError, StorageUnavailable
from storage.objects.prefetch import in_order
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.open import open_store
from storage.urls import overlaps, shown_url

IMAGES_PER_SHARD = 1000
SHARD_BYTES = 256 << 20
MAX_IMAGE_BYTES = 512 << 20
_OUTAGE = 20  # unreachable entries in a row that are an outage
_HOPELESS = 20  # this many failures in a row from the start are not the entries' fault


@dataclass(frozen=True, slots=True)
class Sizes:
    """The limits of ``ingest``, by the same names."""

    images_per_shard: int = IMAGES_PER_SHARD
    shard_bytes: int = SHARD_BYTES
    max_image_bytes: int = MAX_IMAGE_BYTES

    def room_in(self, shard: ShardInMaking, fetched: Fetched) -> bool:
        """Return whether a shard stays within them with one more entry."""
        return shard.has_room(fetched, self.images_per_shard, self.shard_bytes)


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """Progress of an ingest: ``entries`` of ``total`` are done, ``kept`` shards already existed."""

    entries: int
    total: int
    images: int
    errors: int
    shards: int
    kept: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class IngestSummary:
    """What an ingest left behind: of this invocation and earlier ones together.

    Attributes:
        images: in all shards; with ``errors`` every entry of the source.
        shards: tars at ``output``; ``kept`` of them were there before this invocation.
        nbytes: of the images.
        errors_url: lists the entries that could not be read; None: there were none.
        remarks: for people, on how the source was read.
        left_out: files not named like images, by suffix or reason.
    """

    source: str
    output: str
    images: int
    errors: int
    shards: int
    kept: int
    nbytes: int
    seconds: float
    errors_url: str | None
    remarks: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """3 where an entry is in no shard."""
        return 3 if self.errors else 0

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"exit_code": self.exit_code}


Progress = Callable[[IngestProgress], None]


def ingest(
    source: str,
    dest: str,
    *,
    options: StorageOptions | None = None,
    name: str | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
    shard_bytes: int = SHARD_BYTES,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    skip_unreachable: bool = False,
    progress: Progress | None = None,
) -> IngestSummary:
    """Pack a source's images into tar shards; run it again to continue where it stopped.

    Args:
        source: a folder or prefix at any URL, a .zip, or a .txt/.csv/.lst list of URLs.
        dest: a folder or prefix at any URL whose store creates atomically.
        name: the shards' first name; None: from the source's.
        images_per_shard, shard_bytes: a shard is closed before it exceeds either; an image
            larger than ``shard_bytes`` has a shard for itself.
        max_image_bytes: larger images are recorded as errors.
        skip_unreachable: set entries aside whose servers do not answer, instead of stopping when
            many in a row do not; the next call tries them again.
        progress: called after every entry and shard.

    Raises:
        ConfigError: ``dest`` overlaps the source, or holds an ingest of something else, of the
            source as it was before it changed, or with other sizes.
        SourceEmpty: no images there.
        SourceError: the zip or list is unreadable, or none of its entries can be fetched.
        StorageError: the source as a whole, or ``dest``, failed; run it again.
    """
    options = options or StorageOptions()
    if overlaps(source, dest):
        raise ConfigError(
            f"the shards' place {shown_url(dest)} overlaps the source {shown_url(source)}",
            hint="write the shards to a folder of their own",
        )
    opened = open_source(source, options, max_image_bytes=max_image_bytes)
    store = open_store(dest, options)
    sizes = Sizes(images_per_shard, shard_bytes, max_image_bytes)
    return pack(
        opened,
        store,
        name or shard_name(source),
        sizes,
        progress,
        skip_unreachable=skip_unreachable,
    )


def pack(
    source: Source,
    store: ObjectStore,
    name: str,
    sizes: Sizes,
    progress: Progress | None = None,
    *,
    skip_unreachable: bool = False,
) -> IngestSummary:
    """``ingest`` with source and store already open."""
    began = time.monotonic()
    surveyed = survey(source)
    surveyed_left = dict(source.left_out.counts)
    if surveyed.entries == 0:
        there = f"there are {left}" if (left := str(source.left_out)) else "there is nothing"
        raise SourceEmpty(
            f"no images in {source.url}; {there}", hint="check the path and the suffixes"
        )
    check_output(store)
    book = IngestBook(store, name)
    identity = {"source": source.url, "fingerprint": surveyed.fingerprint}
    book.open(identity | {"entries": surveyed.entries} | asdict(sizes))
    total = _Total(IngestProgress(0, surveyed.entries, 0, 0, 0, 0, 0), progress)
    entries = source.entries()
    _keep_or_rebuild(book, source, entries, total)
    failed = book.failures() if total.now.errors else {}
    _pack_the_rest(book, source, entries, sizes, total, skip_unreachable)
    if failed:
        _try_again(book, source, failed, sizes, total)
    done = total.now
    errors_url = book.write_errors() if done.errors or failed else None
    return IngestSummary(
        source=source.url,
        output=store.url,
        images=done.images,
        errors=done.errors,
        shards=done.shards,
        kept=done.kept,
        nbytes=done.nbytes,
        seconds=time.monotonic() - began,
        errors_url=errors_url if done.errors else None,
        remarks=source.remarks(),
        left_out=surveyed_left,
    )


def shard_name(source: str) -> str:
    """Return the last part of a URL without its suffix, in plain characters."""
    last = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    stem = re.sub(r"\.(zip|txt|csv|lst)$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "images"


class _Total:
    """Add up the entries and report progress."""

    def __init__(self, start: IngestProgress, tell: Progress | None) -> None:
        self.now = start
        self._tell = tell

    def entry(self) -> None:
        self.now = replace(self.now, entries=self.now.entries + 1)
        if self._tell is not None:
            self._tell(self.now)

    def shard(self, record: ShardRecord, *, kept: bool) -> None:
        now = self.now
        self.now = replace(
            now,
            entries=record.last,
            images=now.images + record.images,
            errors=now.errors + len(record.failures) - len(record.entries or ()),
            shards=now.shards + (record.images > 0),
            kept=now.kept + (kept and record.images > 0),
            nbytes=now.nbytes + record.image_nbytes,
        )
        if self._tell is not None:
            self._tell(self.now)


def _keep_or_rebuild(
    book: IngestBook, source: Source, entries: Iterator[Entry], total: _Total
) -> None:
    """Walk the records that are there: pass over finished shards, make unfinished ones again."""
    for record in book.records():
        covered = list(islice(entries, record.last - record.first))
        finished = book.has_tar(record)
        if not finished:
            failed = {failure.entry for failure in record.failures}
            numbered: Iterator[tuple[int, Entry]] = enumerate(covered, record.first)
            if record.entries is not None:
                numbered = _numbered(source, record.entries)
            wanted = [(n, entry) for n, entry in numbered if n not in failed]
            record = _rebuild(book, source, record, wanted, total)
        total.shard(record, kept=finished)


def _numbered(source: Source, numbers: Iterable[int]) -> Iterator[tuple[int, Entry]]:
    wanted = set(numbers)
    return ((n, entry) for n, entry in enumerate(source.entries()) if n in wanted)


def _rebuild(
    book: IngestBook,
    source: Source,
    record: ShardRecord,
    wanted: Sequence[tuple[int, Entry]],
    total: _Total,
) -> ShardRecord:
    """Make the tar of a record. Where entries cannot be read any more, the record is replaced by
    one that has them among its failures."""
    with ShardInMaking(record.index, record.first) as shard:
        fetched_entries = _fetch(source, (entry for _, entry in wanted))
        for (number, _), fetched in zip(wanted, fetched_entries, strict=True):
            shard.add(fetched, number)
            total.entry()
        spool = shard.close()
        if shard.failures:
            lost = {failure.entry for failure in shard.failures}
            failures = sorted((*record.failures, *shard.failures), key=lambda f: f.entry)
            made = shard.record(spool)
            kept = None
            if record.entries is not None:  # those lost are failures of an earlier record
                failures, kept = [], tuple(n for n in record.entries if n not in lost)
            record = replace(
                made, first=record.first, last=record.last, failures=tuple(failures), entries=kept
            )
            book.replace_record(record)
        book.write_tar(record, spool)
    return record


def _pack_the_rest(
    book: IngestBook,
    source: Source,
    entries: Iterator[Entry],
    sizes: Sizes,
    total: _Total,
    skip_unreachable: bool,
) -> None:
    fetched_entries = _fetch(source, entries)
    if not skip_unreachable:
        fetched_entries = _stopping_at_an_outage(source, fetched_entries)
    with closing(fetched_entries):
        held = next(fetched_entries, None)
        while held is not None:
            first = book.next_entry()
            with ShardInMaking(book.next_index(), first) as shard:
                while held is not None and sizes.room_in(shard, held):
                    shard.add(held)
                    total.entry()
                    if first == 0 and shard.hopeless(_HOPELESS):
                        raise SourceError(
                            f"none of the first {_HOPELESS} entries of {source.url} can be read; "
                            f"the last one: {held.entry.where}: {held.error}",
                            hint="check the network, the credentials and the list itself",
                        )
                    held = next(fetched_entries, None)
                spool = shard.close()
                record = shard.record(spool)
                book.write_record(record)
                book.write_tar(record, spool)
            total.shard(record, kept=False)


def _stopping_at_an_outage(
    source: Source, fetched_entries: Iterator[Fetched]
) -> Generator[Fetched, None, None]:
    """Raise StorageUnavailable before recording failures that are a server's fault."""
    waiting: list[Fetched] = []  # unreachable ones, until another one is read
    read = False
    for fetched in fetched_entries:
        if not fetched.unreachable:
            yield from waiting
            waiting.clear()
            read = True
            yield fetched
            continue
        waiting.append(fetched)
        if len(waiting) >= _OUTAGE:
            break
    if waiting and (len(waiting) >= _OUTAGE or not read):
        last = waiting[-1]
        raise StorageUnavailable(
            f"{len(waiting)} entries of {source.url} in a row cannot be fetched; the last one: "
            f"{last.entry.where}: {last.error}",
            hint="what was packed stays: run the same command again when the server answers, or "
            "with --skip-unreachable to set them aside",
        )
    yield from waiting


def _try_again(
    book: IngestBook,
    source: Source,
    failed: Mapping[int, Failure],
    sizes: Sizes,
    total: _Total,
) -> None:
    """Put entries that failed in earlier calls and can be read now into shards of their own."""
    wanted = list(_numbered(source, failed))
    fetched_entries = _fetch(source, (entry for _, entry in wanted))
    read = (
        (number, fetched)
        for (number, _), fetched in zip(wanted, fetched_entries, strict=True)
        if fetched.error is None
    )
    held = next(read, None)
    while held is not None:
        index, first, numbers = book.next_index(), book.next_entry(), []
        with ShardInMaking(index, first) as shard:
            while held is not None and sizes.room_in(shard, held[1]):
                shard.add(held[1])
                numbers.append(held[0])
                held = next(read, None)
            spool = shard.close()
            record = replace(shard.record(spool), last=first, entries=tuple(numbers))
            book.write_record(record)
            book.write_tar(record, spool)
        total.shard(record, kept=False)


def _fetch(source: Source, entries: Iterator[Entry]) -> Generator[Fetched, None, None]:
    return in_order(entries, fetch, lambda entry: entry.nbytes, readers=source.readers)

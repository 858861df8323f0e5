"""Ingest: images from a folder, a zip or a list of URLs into tar shards, byte for byte.

    <dest>/<name>-000000.tar            a shard: PAX tar, every time stamp 0, same input same bytes
    <dest>/<name>.ingest/source.json    what is ingested, how; created first, compared on a re-run
    <dest>/<name>.ingest/000000.json    which entries went into shard 0, and which could not
    <dest>/<name>.ingest/errors.jsonl   all entries that could not be read, written at the end

A shard's record is created before its tar, so that after a kill the same entries make the same
tar. Everything but errors.jsonl is written by atomic create and never again: nothing that lies
in ``dest`` already is overwritten, and nothing is deleted. A source that changed since its first
ingest is refused, since its entries would no longer be those of the records.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from pipelines.ingest.book import IngestBook, ShardRecord
from pipelines.ingest.entries import Entry, Source, survey
from pipelines.ingest.shard import Fetched, ShardInMaking, fetch
from pipelines.ingest.sources import open_source
from storage.errors import ConfigError, SourceEmpty, SourceError
from storage.objects.prefetch import in_order
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.open import open_store
from storage.urls import overlaps, shown_url

IMAGES_PER_SHARD = 1000
SHARD_BYTES = 256 << 20
MAX_IMAGE_BYTES = 512 << 20
_HOPELESS = 20  # when so many entries fail in a row from the start, the cause is not theirs


@dataclass(frozen=True, slots=True)
class Sizes:
    """The limits of ``ingest``, by the same names."""

    images_per_shard: int = IMAGES_PER_SHARD
    shard_bytes: int = SHARD_BYTES
    max_image_bytes: int = MAX_IMAGE_BYTES


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """How far an ingest is; ``entries`` of ``total`` are behind it, ``kept`` shards were there."""

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

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


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
        progress: called after every entry and shard.

    Raises:
        ConfigError: ``dest`` overlaps the source, or holds an ingest of something else, of the
            source as it was before it changed, or with other sizes.
        SourceEmpty: no images there.
        SourceError: an unreadable zip or list, or nothing of it can be fetched.
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
    return pack(opened, store, name or shard_name(source), sizes, progress)


def pack(
    source: Source,
    store: ObjectStore,
    name: str,
    sizes: Sizes,
    progress: Progress | None = None,
) -> IngestSummary:
    """``ingest`` with source and store already open."""
    began = time.monotonic()
    surveyed = survey(source)
    if surveyed.entries == 0:
        raise SourceEmpty(f"no images in {source.url}", hint="check the path and the suffixes")
    check_output(store)
    book = IngestBook(store, name)
    identity = {"source": source.url, "fingerprint": surveyed.fingerprint}
    book.open(identity | {"entries": surveyed.entries} | asdict(sizes))
    total = _Total(IngestProgress(0, surveyed.entries, 0, 0, 0, 0, 0), progress)
    entries = source.entries()
    _keep_or_rebuild(book, source, entries, total)
    _pack_the_rest(book, source, entries, sizes, total)
    done = total.now
    return IngestSummary(
        source=source.url,
        output=store.url,
        images=done.images,
        errors=done.errors,
        shards=done.shards,
        kept=done.kept,
        nbytes=done.nbytes,
        seconds=time.monotonic() - began,
        errors_url=book.write_errors() if done.errors else None,
    )


def shard_name(source: str) -> str:
    """The last part of a URL without its suffix, in plain characters."""
    last = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    stem = re.sub(r"\.(zip|txt|csv|lst)$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "images"


class _Total:
    """Adds up and tells."""

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
            errors=now.errors + len(record.failures),
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
        covered = islice(entries, record.last - record.first)
        if book.has_tar(record):
            for _ in covered:
                pass
            total.shard(record, kept=True)
            continue
        failed = {failure.entry for failure in record.failures}
        wanted = (e for n, e in enumerate(covered, record.first) if n not in failed)
        with ShardInMaking(record.index, record.first) as shard:
            for fetched in _fetch(source, wanted):
                if fetched.error is not None:
                    raise SourceError(
                        f"{fetched.entry.where} could be read once and now cannot: {fetched.error}",
                        hint="mend it and run ingest again, or ingest into another folder",
                    )
                shard.add(fetched)
                total.entry()
            book.write_tar(record, shard.close())
        total.shard(record, kept=False)


def _pack_the_rest(
    book: IngestBook,
    source: Source,
    entries: Iterator[Entry],
    sizes: Sizes,
    total: _Total,
) -> None:
    fetched_entries = _fetch(source, entries)
    with closing(fetched_entries):
        held = next(fetched_entries, None)
        while held is not None:
            first = book.next_entry()
            with ShardInMaking(book.next_index(), first) as shard:
                while held is not None and shard.has_room(
                    held, sizes.images_per_shard, sizes.shard_bytes
                ):
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


def _fetch(source: Source, entries: Iterator[Entry]) -> Generator[Fetched, None, None]:
    return in_order(entries, fetch, lambda entry: entry.nbytes, readers=source.readers)

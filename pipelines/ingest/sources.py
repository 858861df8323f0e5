"""The sources of an ingest: a folder or a zip here, a list in url_list.py."""

from __future__ import annotations

import functools
import io
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator

from pipelines.ingest.entries import Entry, Source, check_size, member_name
from pipelines.ingest.url_list import ListSource
from pipelines.ingest.zip_names import zip_name
from storage.errors import (
    ConfigError,
    ObjectChanged,
    ObjectNotFound,
    SourceError,
    StorageError,
    Undecodable,
    Unsupported,
)
from storage.objects.protocols import StorageOptions
from storage.objects.ranged_file import open_ranged
from storage.records import FOLDER_LINK_ETAG, LINK_ETAG, SPECIAL_ETAG, StoredObject
from storage.shards.selecting import LeftOut, classify, list_source
from storage.stores.open import open_object, open_store
from storage.urls import shown_url

# What zipfile unpacks piece by piece. bz2 and lzma it unpacks whole: gigabytes from a kilobyte.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
LIST_SUFFIXES = (".txt", ".csv", ".lst")


def open_source(url: str, options: StorageOptions, *, max_image_bytes: int) -> Source:
    """Open the source at a URL; its suffix tells a zip or list (.txt, .csv, .lst) from a folder.

    Raises:
        ConfigError: it is a tar shard already.
        SourceError: the zip or the list cannot be read.
        StorageError: it is not there, or access is denied.
    """
    name = url.partition("?")[0].rstrip("/").lower()
    if classify(name) == "tar":
        raise ConfigError(
            f"{shown_url(url)} is a tar shard already",
            hint="give its folder as source.url of a run; it needs no ingest",
        )
    if name.endswith(".zip"):
        return ZipSource(url, options, max_image_bytes)
    if name.endswith(LIST_SUFFIXES):
        return ListSource(url, options, max_image_bytes)
    return FolderSource(url, options, max_image_bytes)


class FolderSource:
    """All images below a URL, in listing order, by their keys."""

    readers = 8

    def __init__(self, url: str, options: StorageOptions, max_image_bytes: int) -> None:
        self._store = open_store(url, options)
        self.left_out = LeftOut()
        self._limit = max_image_bytes

    @property
    def url(self) -> str:
        return self._store.url

    def entries(self) -> Iterator[Entry]:
        left = LeftOut()
        for listed in list_source(self._store, kind="images", left_out=left):
            yield Entry(
                member_name(listed.key),
                f"{self.url}/{listed.key}",
                listed.nbytes,
                listed.etag,
                functools.partial(self._read, listed),
            )
        self.left_out = left

    def remarks(self) -> list[str]:
        return []

    def _read(self, listed: StoredObject) -> bytes:
        if listed.etag == LINK_ETAG:
            raise Unsupported("a symbolic link; links are not followed")
        if listed.etag == FOLDER_LINK_ETAG:
            raise Unsupported("a symbolic link to a folder; links are not followed")
        if listed.etag == SPECIAL_ETAG:
            raise Unsupported("a pipe, socket or device, not a plain file")
        check_size(listed.nbytes, self._limit)
        try:
            return self._store.get(listed.key, if_match=listed.etag)
        except ObjectNotFound as exc:
            raise Undecodable("deleted since it was listed") from exc
        except ObjectChanged as exc:
            raise Undecodable("changed since it was listed") from exc


class ZipSource:
    """All images in a zip, in the order of its directory, by ranged reads: nothing is unpacked."""

    readers = 1  # members share one file position

    def __init__(self, url: str, options: StorageOptions, max_image_bytes: int) -> None:
        store, key = open_object(url, options)
        self.url = shown_url(url)
        self.left_out = LeftOut()
        self._limit = max_image_bytes
        self._lock = threading.Lock()
        file = open_ranged(store, key)
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as exc:
            raise SourceError(
                f"{self.url} is not a readable zip: {exc}",
                hint="it may be truncated: compare its size with the original's and fetch it again",
            ) from exc
        # A modern zip bomb: thousands of members that share the same few bytes.
        if sum(m.compress_size for m in self._zip.infolist()) > file.seek(0, io.SEEK_END):
            raise SourceError(
                f"{self.url} announces more bytes than it has: its members overlap",
                hint="no zip program writes such a file; unpack it elsewhere if you trust it",
            )

    def entries(self) -> Iterator[Entry]:
        left = LeftOut()
        for member in self._zip.infolist():
            name = zip_name(member).text
            if name.endswith("/"):
                continue
            if (found := classify(name)) != "image":
                left.note(name) if found == "other" else left.note_filtered()
            else:
                yield Entry(
                    member_name(name),
                    f"{self.url}#{name}",
                    member.file_size,
                    f"{member.CRC:08x}",
                    functools.partial(self._read, member),
                )
        self.left_out = left

    def remarks(self) -> list[str]:
        """Return how many names were guessed, by code page."""
        guessed = Counter(zip_name(member).encoding for member in self._zip.infolist())
        return [
            f"{guessed[encoding]:,} names do not say their encoding; read as {encoding}"
            for encoding in ("utf-8", "cp932", "cp437")
            if guessed[encoding]
        ]

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        if member.flag_bits & 0x1:
            raise Undecodable("encrypted")
        if member.external_attr >> 28 == 0xA:  # S_IFLNK in the Unix mode
            raise Unsupported("a symbolic link; links are not followed")
        if member.compress_type not in _BOUNDED:
            raise Unsupported("compressed otherwise than by deflate; zip it again")
        check_size(member.file_size, self._limit)
        try:
            with self._lock, self._zip.open(member) as file:
                # Never more than the directory says; the checksum tells when that is a lie.
                body = file.read(member.file_size)
                if len(body) < member.file_size:
                    raise Undecodable(f"not the {member.file_size} bytes its directory entry says")
        except StorageError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as exc:
            raise Undecodable(f"damaged zip member: {exc}") from exc
        except (OSError, ValueError, RuntimeError, struct.error) as exc:
            raise Undecodable(f"damaged zip member: {type(exc).__name__}: {exc}") from exc
        return body

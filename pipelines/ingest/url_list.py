"""A list of URLs or paths as an ingest source."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote

from pipelines.ingest.entries import Entry, Unreachable, check_size, member_name
from storage.errors import (
    ConfigError,
    ShortRead,
    SourceError,
    StorageError,
    StorageUnavailable,
    Undecodable,
)
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.shards.selecting import LeftOut
from storage.stores.open import open_object, open_store
from storage.urls import parse_url, shown_url, split_url

if TYPE_CHECKING:
    from storage.stores.web_get import WebGet

_URL_COLUMNS = ("url", "uri", "image_url", "coco_url", "path", "file_name", "filename", "image")
_UNKNOWN_NBYTES = 8 << 20


class ListSource:
    """The images a text file (one URL or path a line) or a CSV (a column of them) names.

    In text, empty lines and lines starting with '#' are skipped. A CSV's column is the one
    called url, path, file_name or the like, else its first. Paths that are neither URLs nor
    absolute are relative to the list's own folder. Lists are untrusted: one
    that was fetched may not name local files, and none may name a cloud's metadata service.
    """

    readers = 8

    def __init__(self, url: str, options: StorageOptions, max_image_bytes: int) -> None:
        self.url = shown_url(url)
        self.left_out = LeftOut()  # every line is an entry
        self._options = options
        self._limit = max_image_bytes
        self._root = split_url(url)[0]
        self._scheme = parse_url(url).scheme
        store, key = open_object(url, options)
        try:
            text = store.get(key).decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            raise SourceError(f"{self.url} is not UTF-8 text: {exc}") from exc
        is_csv = key.partition("?")[0].lower().endswith(".csv")
        self._items = _csv_items(text) if is_csv else _text_items(text)
        self._opening = threading.Lock()
        self._web: WebGet | None = None
        # Opening a store costs a client; entries of one bucket or folder share it.
        self._open = functools.lru_cache(maxsize=256)(self._open_root)

    def entries(self) -> Iterator[Entry]:
        for item in self._items:
            url = self._absolute(item)
            yield Entry(
                _name_of_url(item),
                shown_url(url),
                _UNKNOWN_NBYTES,
                hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:16],
                functools.partial(self._read, url),
            )

    def remarks(self) -> list[str]:
        return []

    def _absolute(self, item: str) -> str:
        return item if "://" in item or item.startswith(("/", "~")) else f"{self._root}/{item}"

    def _open_root(self, root: str) -> ObjectStore:
        return open_store(root, self._options)

    def _read(self, url: str) -> bytes:
        try:
            place = parse_url(url)
            if place.scheme in ("http", "https"):
                return self._from_web(url)
            if place.scheme in ("file", "memory") and place.scheme != self._scheme:
                raise ConfigError("a list from elsewhere may not name files of this machine")
            if place.scheme in ("s3", "gs", "az"):  # one client a bucket
                store, key = self._open(f"{place.scheme}://{place.authority}"), place.path
            else:
                root, key = split_url(url)
                store = self._open(root)
            with store.stream(key) as file:
                return _read_all(file, self._limit)
        except (StorageUnavailable, ShortRead) as exc:
            raise Unreachable(f"cannot be fetched now: {exc.message}") from exc
        except (StorageError, ConfigError) as exc:
            raise Undecodable(f"cannot be fetched: {exc.message}") from exc

    def _from_web(self, url: str) -> bytes:
        with self._opening:
            if self._web is None:
                from storage.stores.web_get import WebGet  # aiohttp, only where needed

                self._web = WebGet(self._options.attempts)
        return self._web.get(url, self._limit)


def _read_all(file: BinaryIO, limit: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    while part := file.read(1 << 20):
        parts.append(part)
        total += len(part)
        check_size(total, limit)
    return b"".join(parts)


def _text_items(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _csv_items(text: str) -> list[str]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in _URL_COLUMNS if name in header), None)
    body = rows if column is None else rows[1:]
    cells = (row[column or 0].strip() for row in body if len(row) > (column or 0))
    return [cell for cell in cells if cell]


def _name_of_url(url: str) -> str:
    """Host and path; never the query, which may hold a signature."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return member_name(url)
    if scheme.lower() in ("http", "https"):
        rest = unquote(rest.partition("#")[0].partition("?")[0])
    return member_name(rest)

"""List a bucket lazily in key order, also if the server uses another order.

S3 lists by the UTF-8 bytes of the whole key. SeaweedFS walks folders by name, so that 'a/x'
comes before 'a-b' although '/' sorts after '-'. There each folder is listed by itself and what
the difference displaces is held back: a few entries, not the folder below.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.errors import StorageError

Page = Mapping[str, Any]
# (prefix, delimiter) to the pages of one ListObjectsV2; translates its own errors.
Pages = Callable[[str, str], Iterator[Page]]


def ordered_entries(pages: Pages, prefix: str, where: str) -> Iterator[Mapping[str, Any]]:
    """Yield the ``Contents`` entries under ``prefix`` in the order of their keys; no folder
    markers.

    Raises:
        StorageError: the server lists in an order that is neither by key nor by folder.
    """
    last = b""
    for entry in _entries(pages, prefix):
        key = entry["Key"].encode("utf-8")
        if key <= last:
            raise StorageError(
                f"{where}: the server lists keys out of order ({entry['Key']!r} came late)",
                hint="S3 Express buckets do so; copy the objects into a general purpose bucket",
            )
        last = key
        if not key.endswith(b"/"):
            yield entry


def _entries(pages: Pages, prefix: str) -> Iterator[Mapping[str, Any]]:
    found = pages(prefix, "")
    for page in found:
        if _walks_folders(page):
            yield from _by_folder(pages, prefix)
            return
        yield from page.get("Contents", ())


def _walks_folders(page: Page) -> bool:
    headers = page.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get("server", "")).startswith("SeaweedFS")


def _by_folder(pages: Pages, prefix: str) -> Iterator[Mapping[str, Any]]:
    pending = [_one_folder(pages(prefix, "/"))]
    while pending:
        found = next(pending[-1], None)
        if found is None:
            pending.pop()
        elif found.entry is None:
            pending.append(_one_folder(pages(found.key.decode("utf-8"), "/")))
        else:
            yield found.entry


@dataclass(frozen=True, slots=True, order=True)
class _Found:
    key: bytes
    entry: Mapping[str, Any] | None = field(compare=False)  # None: a folder

    @property
    def name(self) -> bytes:
        return self.key.rstrip(b"/")


def _one_folder(pages: Iterable[Page]) -> Iterator[_Found]:
    """Yield one folder's files and folders in key order, from pages ordered by name."""
    held: list[_Found] = []
    for page in pages:
        for found in sorted(_found(page), key=lambda f: f.name):
            # Later names sort at or after this one, so everything before it is complete.
            while held and held[0].key < found.name:
                yield heapq.heappop(held)
            heapq.heappush(held, found)
    while held:
        yield heapq.heappop(held)


def _found(page: Page) -> Iterator[_Found]:
    for entry in page.get("Contents", ()):
        yield _Found(entry["Key"].encode("utf-8"), entry)
    for folder in page.get("CommonPrefixes", ()):
        yield _Found(folder["Prefix"].encode("utf-8"), None)

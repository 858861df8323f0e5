"""Bring a listing into the order of the keys' UTF-8 bytes.

A server that compares UTF-16 units puts characters beyond U+FFFF (as surrogates, D800 to DFFF)
before U+E000 to U+FFFF. Keys that agree up to such a character are contiguous in both orders, so
only those are held back and sorted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from storage.errors import StorageError

_HIGH = re.compile("[\ue000-\uffff\U00010000-\U0010ffff]")

Entry = Mapping[str, Any]


def by_code_point(entries: Iterable[Entry], where: str) -> Iterator[Entry]:
    """Yield the entries in the order of their ``path``; no folder markers.

    Raises:
        StorageError: the server lists in yet another order.
    """
    last = ""
    for found in _sorted_blocks(entries):
        path = found["path"]
        if path <= last:
            raise StorageError(
                f"{where}: the server lists keys out of order ({path!r} came late)",
                hint="accounts with a hierarchical namespace may do so; use a flat one",
            )
        last = path
        if not path.endswith("/"):
            yield found


def just_before(prefix: str) -> str | None:
    """Return a key that sorts before everything with that prefix; None: begin at the folder.

    It is one that obstore takes for a key: neither an empty part, nor "." or "..".
    """
    last = prefix[-1:]
    if not "!" < last <= "~":
        return None
    return prefix[:-1] + ("-" if last == "0" else chr(ord(last) - 1))


def _sorted_blocks(entries: Iterable[Entry]) -> Iterator[Entry]:
    held: list[Entry] = []
    common = ""
    for found in entries:
        path = found["path"]
        high = _HIGH.search(path)
        if held and (not path.startswith(common) or not _HIGH.match(path, len(common))):
            yield from sorted(held, key=lambda e: str(e["path"]))
            held = []
        if held:
            held.append(found)
        elif high is None:
            yield found
        else:
            common, held = path[: high.start()], [found]
    yield from sorted(held, key=lambda e: str(e["path"]))

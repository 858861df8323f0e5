"""The ledger of one invocation: the driver's events, in numbered JSON-lines parts.

The last line of a part holds the sha256 of the lines before it; a part that does not match it
is skipped entirely. Parts of older versions end without such a line, and are read line by line.

It is a cache for ``status`` and ``report`` (throughput over time, seconds per stage): the
annotation objects are authoritative, and whatever the ledger lacks is read from their footers.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from storage.objects.protocols import ObjectStore

LEDGER = "ledger/"
_READERS = 16


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of the ledger.

    Attributes:
        event: start, ready (a worker accepts shards), shard, beat, end.
        at: seconds since the epoch, on the driver's clock.
        shard_id: for ``shard``.
        counts: rows per status, for ``shard``.
        detections: for ``shard``.
        seconds: per stage, for ``shard``.
        note: event-specific facts: the worker, the outcome, the number of live workers.
    """

    event: str
    at: float
    shard_id: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    detections: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)


def new_invocation(now: datetime | None = None) -> str:
    """Return an id that sorts by time: 20260131T120000Z-1f3a9c."""
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    return f"{stamp}-{secrets.token_hex(3)}"


class LedgerWriter:
    """Buffers entries; writes a part when it is large or old enough. Not thread-safe."""

    def __init__(
        self,
        store: ObjectStore,
        invocation: str,
        *,
        max_lines: int = 1000,
        max_age_s: float = 5.0,
    ) -> None:
        self._store, self._invocation = store, invocation
        self._max_lines, self._max_age_s = max_lines, max_age_s
        self._buffer: list[LedgerEntry] = []
        self._part = 0

    def write(self, entry: LedgerEntry) -> None:
        """Add an entry; a part is written when ``max_lines`` or ``max_age_s`` is reached."""
        self._buffer.append(entry)
        age_s = entry.at - self._buffer[0].at
        if len(self._buffer) >= self._max_lines or age_s >= self._max_age_s or age_s < 0:
            self.flush()

    def flush(self) -> None:
        """Write the buffered entries as the next part."""
        if not self._buffer:
            return
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in self._buffer).encode()
        digest = json.dumps({"sha256": hashlib.sha256(lines).hexdigest()}) + "\n"
        # Overwrite: an invocation has one writer, and a put whose reply was lost is repeated.
        self._store.put(
            f"{LEDGER}{self._invocation}/{self._part:06d}.jsonl", lines + digest.encode()
        )
        self._part += 1
        self._buffer.clear()


def invocations(store: ObjectStore) -> list[str]:
    """Return the ids of all invocations with a ledger, oldest first."""
    found = {o.key.removeprefix(LEDGER).split("/", 1)[0] for o in store.list(LEDGER)}
    return sorted(found)


def read_ledger(store: ObjectStore, invocation: str) -> Iterator[LedgerEntry]:
    """Yield the entries of one invocation, in order; skip those that cannot be read."""
    for _, part in ledger_parts(store, invocation):
        yield from entries_of(part)


def ledger_parts(store: ObjectStore, invocation: str) -> Iterator[tuple[str, bytes]]:
    """Yield (key, bytes) of the parts of one invocation, in order.

    Parts are fetched in parallel: a run of several days leaves tens of thousands.
    """
    keys = (listed.key for listed in store.list(f"{LEDGER}{invocation}/"))
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for several in _batches(keys, _READERS * 4):
            yield from zip(several, pool.map(store.get, several), strict=True)


def _batches(keys: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(keys, size)):
        yield batch


_DAMAGED = (ValueError, TypeError, RecursionError)


_SEALED = re.compile(rb'\{"sha256": "([0-9a-f]{64})"\}\n')


def part_is_whole(part: bytes) -> bool:
    """Return whether a part matches its digest; parts of older versions have none and pass."""
    lines, digest = _unsealed(part)
    if digest is None:
        return all(_is_entry(line) for line in lines.splitlines())
    return hashlib.sha256(lines).hexdigest() == digest


def _unsealed(part: bytes) -> tuple[bytes, str | None]:
    at = part.rfind(b"\n", 0, -1) + 1
    if sealed := _SEALED.fullmatch(part, at):
        return part[:at], sealed[1].decode()
    return part, None


def _is_entry(line: bytes) -> bool:
    try:
        LedgerEntry(**json.loads(line))
    except _DAMAGED:
        return False
    return True


def entries_of(part: bytes) -> Iterator[LedgerEntry]:
    """Yield the entries of one part; skip those that cannot be read."""
    body, digest = _unsealed(part)
    if digest is not None and hashlib.sha256(body).hexdigest() != digest:
        return
    lines = body.splitlines()
    try:  # parsing all lines at once takes half the time
        yield from [LedgerEntry(**fields) for fields in json.loads(b"[%b]" % b",".join(lines))]
        return
    except _DAMAGED:
        pass
    for line in lines:
        # Only a cache: a damaged or foreign entry is replaced by data from the footers.
        with suppress(*_DAMAGED):
            yield LedgerEntry(**json.loads(line))

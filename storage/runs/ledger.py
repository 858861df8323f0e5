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
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from storage.objects.prefetch import in_order
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
    with closing(in_order(keys, lambda key: (key, store.get(key)), readers=_READERS)) as parts:
        yield from parts


_DAMAGED = (ValueError, TypeError, RecursionError)
_NEVER_S = 253_402_300_800.0  # the year 10000: later times, and longer ones, are none
_MANY = 1 << 53


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MANY


def _is_threads(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    """Return whether a value is a number of sane size, and neither NaN nor infinity."""
    return type(value) in (float, int) and 0 <= value < _NEVER_S  # type: ignore[operator]  # a number


def _is_name(value: object) -> bool:
    return type(value) in (str, int)


def _are_counts(value: object) -> bool:
    if type(value) is not dict or not value:
        return value == {}
    counts = value.values()
    return {int}.issuperset(map(type, counts)) and min(counts) >= 0 and sum(counts) < _MANY


def _are_numbers(value: object) -> bool:
    """Return whether all values are numbers; NaN and infinity show in the sum."""
    if type(value) is not dict or not value:
        return value == {}
    numbers = value.values()
    try:
        return (
            {float, int}.issuperset(map(type, numbers))
            and min(numbers) >= 0
            and sum(numbers) < _NEVER_S
        )
    except OverflowError:  # a whole number that no float can hold
        return False


# Facts of a note that are read; one of another type counts as not told.
_FACTS: Mapping[str, Callable[[object], bool]] = {
    "worker": _is_name,
    "outcome": lambda value: type(value) is str,
    "won": lambda value: type(value) is bool,
    "alive": _is_count,
    "workers": _is_count,
    "gpus": _is_number,
    "decoders": _is_threads,
    "nms_threads": _is_threads,
    "before_s": _is_number,
    "fill": _are_numbers,
    "warnings": _are_counts,
}


def _entry(fields: Any) -> LedgerEntry:
    """Return one entry of a part, without facts of a wrong type. Raises one of ``_DAMAGED``."""
    made = LedgerEntry(**fields)
    if not (
        type(made.event) is str
        and _is_number(made.at)
        and (made.shard_id is None or type(made.shard_id) is str)
        and _are_counts(made.counts)
        and _is_count(made.detections)
        and _are_numbers(made.seconds)
        and type(made.note) is dict
    ):
        raise TypeError("a field has a wrong type")
    for name in made.note.keys() & _FACTS.keys():
        if not _FACTS[name](made.note[name]):
            del made.note[name]
    return made


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
        _entry(json.loads(line))
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
        yield from [_entry(fields) for fields in json.loads(b"[%b]" % b",".join(lines))]
        return
    except _DAMAGED:
        pass
    for line in lines:
        # Only a cache: a damaged or foreign entry is replaced by data from the footers.
        with suppress(*_DAMAGED):
            yield _entry(json.loads(line))

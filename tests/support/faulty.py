"""FaultyStore: any store with trouble injected."""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar, cast

from storage.errors import ShortRead, StorageError, StorageUnavailable
from storage.objects.protocols import Body, ObjectStore
from storage.records import StoredObject

_T = TypeVar("_T")
Verb = Literal[
    "list", "head", "get", "get_range", "stream", "create", "put", "replace", "delete", "presign"
]
Effect = Literal["fail", "drop_reply", "truncate", "delay", "stale"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of trouble. Written with ``fail``, ``drop_reply``, ``truncate``, ``delay`` and
    ``stale_list`` below.

    Attributes:
        effect: what happens.
        verb: on which calls; ``*``: all.
        prefix: only keys (for ``list``, prefixes) that start with it.
        after: number of matching calls that succeed first.
        times: number of calls that then fail; None: all.
        share: the chance, 0 to 1, that a call that is due is hit; drawn from the store's seed.
        error: what ``fail`` raises.
        keep_bytes: how much ``truncate`` lets through.
        seconds: how long ``delay`` takes.
    """

    effect: Effect
    verb: Verb | Literal["*"]
    prefix: str = ""
    after: int = 0
    times: int | None = 1
    share: float = 1.0
    error: type[StorageError] = StorageUnavailable
    keep_bytes: int = 0
    seconds: float = 0.0

    def matches(self, verb: Verb, key: str) -> bool:
        """Return whether a call is of the kind this fault hits."""
        return self.verb in ("*", verb) and key.startswith(self.prefix)


def fail(
    verb: Verb | Literal["*"],
    prefix: str = "",
    *,
    error: type[StorageError] = StorageUnavailable,
    times: int | None = 1,
    after: int = 0,
    share: float = 1.0,
) -> Fault:
    """Raise ``error`` from the call and do nothing (AccessDenied from the n-th on:
    ``times=None, after=n``)."""
    return Fault("fail", verb, prefix, after, times, share, error=error)


def drop_reply(
    verb: Verb, prefix: str = "", *, times: int | None = 1, after: int = 0, share: float = 1.0
) -> Fault:
    """Do the call's work, then raise StorageUnavailable: the reply was lost."""
    return Fault("drop_reply", verb, prefix, after, times, share)


def truncate(
    verb: Literal["get", "get_range", "stream"],
    prefix: str = "",
    *,
    keep_bytes: int = 0,
    times: int | None = 1,
    after: int = 0,
    share: float = 1.0,
) -> Fault:
    """End the read early with ShortRead (from a stream, after ``keep_bytes`` bytes)."""
    return Fault("truncate", verb, prefix, after, times, share, keep_bytes=keep_bytes)


def delay(
    verb: Verb | Literal["*"],
    prefix: str = "",
    *,
    seconds: float,
    times: int | None = None,
    after: int = 0,
    share: float = 1.0,
) -> Fault:
    """Sleep before the call."""
    return Fault("delay", verb, prefix, after, times, share, seconds=seconds)


def stale_list(prefix: str = "", *, times: int | None = 1, after: int = 0) -> Fault:
    """Hide from listings whatever was written through this wrapper."""
    return Fault("stale", "list", prefix, after, times)


class FaultyStore:
    """A store that behaves like ``store`` except where ``faults`` say otherwise.

    Which calls are hit depends on the order of the calls and the seed alone.

    Args:
        store: does the work.
        faults: all that match a call take effect.
        seed: for faults with a ``share``.
        sleep: takes seconds; for ``delay``.

    Attributes:
        calls: how often each verb was called, hit or not.
        hits: how often each effect took place.
    """

    def __init__(
        self,
        store: ObjectStore,
        faults: Sequence[Fault] = (),
        *,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._faults = tuple(faults)
        self._random = random.Random(seed)
        self._sleep = sleep
        self._lock = threading.Lock()
        self._seen: Counter[int] = Counter()
        self._written: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def atomic_create(self) -> bool:
        return self._store.atomic_create

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        effects = self._before("list", prefix)
        hidden = self._written if "stale" in {e.effect for e in effects} else ()
        found = self._after(effects, prefix, lambda: self._store.list(prefix))
        return (o for o in found if o.key not in hidden)

    def head(self, key: str) -> StoredObject:
        return self._call("head", key, lambda: self._store.head(key))

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        return self._call("get", key, lambda: self._store.get(key, if_match=if_match))

    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        return self._call(
            "get_range",
            key,
            lambda: self._store.get_range(key, offset, nbytes, if_match=if_match),
        )

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        effects = self._before("stream", key)
        cut = min((e.keep_bytes for e in effects if e.effect == "truncate"), default=None)
        with self._store.stream(key, if_match=if_match) as source:
            if cut is None:
                yield source
            else:
                yield cast(BinaryIO, io.BufferedReader(_CutFile(source, cut, key)))

    def create(self, key: str, body: Body) -> str:
        return self._write("create", key, lambda: self._store.create(key, body))

    def put(self, key: str, body: Body) -> str:
        return self._write("put", key, lambda: self._store.put(key, body))

    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        return self._write(
            "replace", key, lambda: self._store.replace(key, body, if_match=if_match)
        )

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._store.delete(key))

    def leftovers(self) -> Iterator[StoredObject]:
        return self._store.leftovers()

    def presign(self, key: str, *, expires_s: int) -> str:
        return self._call("presign", key, lambda: self._store.presign(key, expires_s=expires_s))

    def _write(self, verb: Verb, key: str, call: Callable[[], str]) -> str:
        def recorded() -> str:
            etag = call()
            with self._lock:
                self._written.add(key)
            return etag

        return self._call(verb, key, recorded)

    def _call(self, verb: Verb, key: str, call: Callable[[], _T]) -> _T:
        return self._after(self._before(verb, key), key, call)

    def _before(self, verb: Verb, key: str) -> tuple[Fault, ...]:
        due = self._due(verb, key)
        for fault in due:
            if fault.effect == "delay":
                self._sleep(fault.seconds)
        for fault in due:
            if fault.effect == "fail":
                raise fault.error(f"{verb} of {key}: injected fault")
        return due

    def _after(self, due: Sequence[Fault], key: str, call: Callable[[], _T]) -> _T:
        result = call()
        effects = {fault.effect for fault in due}
        if "truncate" in effects:
            raise ShortRead(f"{key}: injected fault, the read ended early")
        if "drop_reply" in effects:
            raise StorageUnavailable(f"{key}: injected fault, the reply was lost")
        return result

    def _due(self, verb: Verb, key: str) -> tuple[Fault, ...]:
        with self._lock:
            self.calls[verb] += 1
            due = tuple(f for i, f in enumerate(self._faults) if self._is_due(i, f, verb, key))
            self.hits.update(f.effect for f in due)
        return due

    def _is_due(self, index: int, fault: Fault, verb: Verb, key: str) -> bool:
        if not fault.matches(verb, key):
            return False
        nth = self._seen[index]
        self._seen[index] += 1
        in_turn = nth >= fault.after and (fault.times is None or nth < fault.after + fault.times)
        return in_turn and (fault.share >= 1.0 or self._random.random() < fault.share)


class _CutFile(io.RawIOBase):
    """A stream that ends in ShortRead after that many bytes, if the object is longer."""

    def __init__(self, source: BinaryIO, keep_bytes: int, key: str) -> None:
        self._source = source
        self._left = keep_bytes
        self._key = key
        self._cut = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._left <= 0:
            self._cut = self._cut or bool(self._source.read(1))
            if self._cut:
                raise ShortRead(f"{self._key}: injected fault, the stream ended early")
            return 0
        part = self._source.read(min(len(buffer), self._left))
        self._left -= len(part)
        buffer[: len(part)] = part
        return len(part)

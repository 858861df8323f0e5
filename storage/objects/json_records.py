"""JSON records: small objects that describe a run, all written and read the same way.

A record carries the sha256 of its other fields under ``digest``, over their canonical JSON, so that
any changed value is an error. Records of older versions have no digest and are read unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from storage.errors import StorageError
from storage.objects.protocols import SupportsGet

DIGEST = "digest"
T = TypeVar("T")

# Raised by a parser for fields it does not expect.
_UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError,
)  # fmt: skip
_HINT = (
    "it was damaged, or changed by hand: restore it; a change that is meant needs its "
    f"`{DIGEST}` removed"
)


def json_record(fields: Mapping[str, Any]) -> bytes:
    """Return fields as a record: indented JSON with its digest."""
    plain = json.loads(json.dumps(fields))  # as a reader will see it: keys are strings
    return json.dumps({**plain, DIGEST: digest_of(plain)}, indent=2).encode()


def digest_of(fields: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of the canonical JSON of ``fields`` without their digest."""
    rest = {name: value for name, value in fields.items() if name != DIGEST}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@overload
def parse_record(raw: bytes, key: str) -> dict[str, Any]: ...
@overload
def parse_record(raw: bytes, key: str, parse: Callable[[dict[str, Any]], T]) -> T: ...
def parse_record(raw: bytes, key: str, parse: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """Check a record's digest and return its fields as converted by ``parse``.

    Args:
        raw: the object.
        key: its name, for messages.
        parse: gets the fields without the digest; its errors are translated.

    Raises:
        StorageError: not JSON, not an object, changed since it was written, or refused by
            ``parse``.
    """
    try:
        fields = json.loads(raw)
        if not isinstance(fields, dict):
            raise TypeError(f"a JSON object is expected, not {type(fields).__name__}")
        if DIGEST in fields and fields[DIGEST] != digest_of(fields):
            raise ValueError("its checksum does not match")
        fields.pop(DIGEST, None)
        return parse(fields)
    except _UNREADABLE as exc:
        said = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise StorageError(f"{key} cannot be read: {said}", hint=_HINT) from exc


@overload
def read_record(store: SupportsGet, key: str) -> dict[str, Any]: ...
@overload
def read_record(store: SupportsGet, key: str, parse: Callable[[dict[str, Any]], T]) -> T: ...
def read_record(store: SupportsGet, key: str, parse: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """Read the record at ``key``; see ``parse_record``. Raises ObjectNotFound, StorageError."""
    return parse_record(store.get(key), key, parse)


def has_digest(raw: bytes) -> bool:
    """Return whether a readable record carries a digest."""
    return DIGEST in json.loads(raw)

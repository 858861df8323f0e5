"""Translate errors from Parquet that is damaged or was written by another program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from storage.errors import StorageError

# pyarrow's own errors, and those its values raise when they do not match the schema:
# missing names, metadata that is not JSON, numbers out of range, sizes that cannot be allocated.
_UNREADABLE = (
    pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError,
    ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


MOVE_IT = "it was damaged or put there by something else; move it away and run again"


@contextmanager
def reading_parquet(key: str, *, hint: str = MOVE_IT) -> Iterator[None]:
    """Translate any error that a damaged file causes in its reader into a StorageError naming
    it."""
    try:
        yield
    except _UNREADABLE as exc:
        said = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise StorageError(
            f"{key} is not a readable Parquet file of labelfleet's: {said}", hint=hint
        ) from exc

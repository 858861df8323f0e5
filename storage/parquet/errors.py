"""What goes wrong when Parquet is read that was damaged, or written by somebody else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from storage.errors import StorageError

# pyarrow's own, and what its values end in when they are not what the schema promises: names that
# are missing, JSON in the metadata that is none, numbers out of range.
_UNREADABLE = (
    pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError,
    OverflowError, RecursionError,
)  # fmt: skip


_MOVE_IT = "it was damaged or put there by something else; move it away and run again"


@contextmanager
def reading_parquet(key: str, *, hint: str = _MOVE_IT) -> Iterator[None]:
    """Turns whatever a damaged file makes of its reader into one StorageError that names it."""
    try:
        yield
    except _UNREADABLE as exc:
        said = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise StorageError(
            f"{key} is not a readable Parquet file of labelfleet's: {said}",
            hint=hint,
        ) from exc

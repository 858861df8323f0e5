"""Errors of a full disk under the Parquet file that a worker is writing."""

from __future__ import annotations

import socket
from pathlib import Path

from storage.errors import LabelfleetError, StorageFull, WorkerDiskFull
from storage.objects.os_errors import from_os_error


def spool_error(exc: OSError, spool: Path) -> LabelfleetError:
    """Translate an operating system error about a spool file."""
    if isinstance(from_os_error(exc, ""), StorageFull):
        return WorkerDiskFull(
            f"no space left for {spool} on {socket.gethostname()}",
            hint="free some space there, or point TMPDIR at a larger disk; then run again",
        )
    return from_os_error(exc, f"the worker's spool file {spool}")

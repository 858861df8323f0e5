"""Where a worker's Parquet files lie while they are written, and what a full disk there means."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from storage.errors import LabelfleetError, StorageFull, WorkerDiskFull
from storage.os_errors import from_os_error

_PREFIX = "labelfleet-spool-"
_KEPT_S = 3600.0


def spool_folder(parent: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder of this process's own; first removes those that killed workers left."""
    _sweep(Path(parent or tempfile.gettempdir()))
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)


def _sweep(parent: Path) -> None:
    """The owner is dead, and nothing was written for an hour."""
    for folder in parent.glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        with suppress(OSError):
            old = time.time() - folder.stat().st_mtime > _KEPT_S
            if old and owner.isdigit() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(folder, ignore_errors=True)


def spool_error(exc: OSError, spool: Path) -> LabelfleetError:
    """What the operating system said of a spool file, in our words."""
    if isinstance(from_os_error(exc, ""), StorageFull):
        return WorkerDiskFull(
            f"no space left for {spool} on {socket.gethostname()}",
            hint="free some space there, or point TMPDIR at a larger disk; then run again",
        )
    return from_os_error(exc, f"the worker's spool file {spool}")

"""Folders of this machine: the user's cache, and the temporary folders of one process."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tempfile  # imported where it is used: every command's start would pay for it

_KEPT_S = 3600.0


def own_folder(purpose: str, parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Create ``labelfleet-<purpose>-<pid>-…`` below ``parent`` or the temporary folder."""
    import tempfile

    prefix = f"labelfleet-{purpose}-"
    _sweep(Path(parent or tempfile.gettempdir()), prefix)
    return tempfile.TemporaryDirectory(
        prefix=f"{prefix}{os.getpid()}-", dir=parent, ignore_cleanup_errors=True
    )


def _sweep(parent: Path, prefix: str) -> None:
    """Remove folders whose owner is dead and which were last written over an hour ago."""
    for folder in parent.glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).split("-")[0]
        with suppress(OSError):
            old = time.time() - folder.stat().st_mtime > _KEPT_S
            if old and owner.isdigit() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(folder, ignore_errors=True)


def cache_folder() -> Path:
    """Return LABELFLEET_CACHE, else labelfleet in XDG_CACHE_HOME, else in ~/.cache.

    A user without a home (a container's unknown user id) gets one in the temporary folder.
    """
    if own := os.environ.get("LABELFLEET_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "labelfleet"
    try:
        return Path.home() / ".cache" / "labelfleet"
    except RuntimeError:
        import tempfile

        return Path(tempfile.gettempdir()) / f"labelfleet-cache-{os.getuid()}"

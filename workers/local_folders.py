"""Where this user's cache is: checkpoints, artefacts, engines. Imports next to nothing."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """LABELFLEET_CACHE, else labelfleet in XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("LABELFLEET_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "labelfleet"

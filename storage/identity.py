"""Digests by which things are told to be the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def config_hash(settings: dict[str, Any]) -> str:
    """16 hex digits of sha256 over the canonical JSON of a run's inference settings."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]

"""Spans of time as people read them."""

from __future__ import annotations


def shown_duration(seconds: float) -> str:
    """``9.5 s``, ``75 s``, ``12 min``, ``5.5 h`` or ``3.0 days``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"

"""One line of what `doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do (empty when nothing)."""

    level: Level
    subject: str
    found: str
    advice: str = ""

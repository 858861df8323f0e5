"""One line of what `doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The thing examined, the result, and what to do about it (empty for nothing)."""

    level: Level
    subject: str
    found: str
    advice: str = ""

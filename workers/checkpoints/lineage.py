"""What a model's ancestors mean for its licence.

A checkpoint names the models it learned from, see ``workers.checkpoints.provenance``; this module
lists them, and tells licences that forbid commercial use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

UNSTATED = "unstated"
_MOST = 200  # ancestors that are listed; a file that claims more is not believed
_FORBIDS = re.compile(
    r"non[\s_-]*commercial|\bnc\b|research[\s-]*(use[\s-]*)?only|evaluation[\s-]*only",
    re.IGNORECASE,
)
# The weights that Deci published with YOLO-NAS; their files do not state a licence.
_DECI = re.compile(r"(^|/)yolo_nas_(pose_)?[snml](_coco|_objects_365)?[^/]*\.pth$|deci\.ai/", re.I)
DECI_LICENCE = "YOLO-NAS licence of Deci (non-commercial)"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A model that another one learned from.

    Attributes:
        role: ``first weights``, ``labels`` or ``teacher``.
        name: of its file, or of the run and its label version.
        sha256: of its weights.
        licence: as its author states it; ``unstated`` where nothing is known.
        depth: 1: the model itself learned from it; 2: one of those did; …
    """

    role: str
    name: str
    sha256: str
    licence: str
    depth: int = 1

    @property
    def non_commercial(self) -> bool:
        """Whether its licence forbids commercial use."""
        return is_non_commercial(self.licence)

    def to_fields(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def is_non_commercial(licence: str | None) -> bool:
    """Return whether a licence, as its author wrote it, forbids commercial use."""
    return bool(licence and _FORBIDS.search(licence))


def stated_licence(licence: str | None, place: str) -> str:
    """Return a checkpoint's licence; for Deci's published weights, which state none, theirs.

    Args:
        licence: as stated, or None.
        place: URL or path of the file.
    """
    said = (licence or "").strip()
    if said.lower() not in ("", UNSTATED, "none", "unknown"):
        return said
    return DECI_LICENCE if _DECI.search(place) else UNSTATED


def carried_licence(given: str | None, own: str | None, place: str) -> str:
    """Return the licence to record for a model: the given one, else the checkpoint's own.

    One that forbids commercial use is not given away: it stays beside the given one.

    Args:
        given: as a config states it; None: nothing.
        own: as the checkpoint states it; None: nothing.
        place: URL or path of the checkpoint.
    """
    known = stated_licence(own, place)
    if given is None or not given.strip():
        return known
    if is_non_commercial(known) and not is_non_commercial(given):
        return f"{given}; the checkpoint says: {known}"
    return given


def ancestors_in(provenance: Mapping[str, Any] | None) -> tuple[Ancestor, ...]:
    """List a checkpoint's ancestors, each once, before its own; malformed ones are left out."""
    found = dict.fromkeys(_walk(provenance, 1))
    return tuple(found)[:_MOST]


def _walk(of: Mapping[str, Any] | None, depth: int) -> Iterator[Ancestor]:
    entries = (of or {}).get("ancestors")
    for entry in entries if isinstance(entries, list) and depth <= _MOST else ():
        if not isinstance(entry, dict):
            continue
        role, place, sha256 = (entry.get(k) for k in ("role", "checkpoint", "sha256"))
        if not (isinstance(role, str) and isinstance(place, str)):
            continue
        licence = entry.get("licence")
        stated = stated_licence(licence if isinstance(licence, str) else None, place)
        name = place.rstrip("/").rsplit("/", 1)[-1]
        yield Ancestor(role, name, sha256 if isinstance(sha256, str) else "", stated, depth)
        yield from _walk(entry, depth + 1)

"""Where a checkpoint's weights come from: the models it learned from, and their licences.

A checkpoint's ``provenance`` is ``{"ancestors": [...]}``. Each ancestor is a mapping of

- ``role``: ``first weights``, ``teacher``, or ``labels`` for the model that labelled images;
- ``checkpoint``: where it was, without secrets; ``sha256``: of its bytes;
- ``licence``: as its author states it, or ``unstated``;
- ``ancestors``: its own, likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.urls import shown_url
from workers.checkpoints.file import Checkpoint
from workers.checkpoints.lineage import UNSTATED, ancestors_in, stated_licence


def ancestor(role: str, url: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the record of a checkpoint that another one learns from."""
    return {
        "role": role,
        "checkpoint": shown_url(url),
        "sha256": checkpoint.sha256,
        "licence": stated_licence(checkpoint.licence, url),
        "ancestors": list((checkpoint.provenance or {}).get("ancestors", ())),
    }


def inherited_licence(own: str, provenance: Mapping[str, Any] | None) -> str:
    """Return the licence text of a model that learned from others: its own, then the others'.

    Licences that are not stated, or that are its own, add nothing. The text goes into the
    checkpoint, and from there into every run that uses it, so that a student of non-commercial
    weights is marked as one.
    """
    first, others = _parts(own)
    for one in ancestors_in(provenance):
        theirs, inherited = _parts(one.licence)
        for text in (theirs, *inherited):
            if text not in ("", UNSTATED, first, *others):
                others.append(text)
    return f"{first}{_LEARNED}{', '.join(others)}" if others else own


def _parts(licence: str) -> tuple[str, list[str]]:
    """Return a model's own licence, and those that its text says it inherited."""
    own, _, inherited = licence.partition(_LEARNED)
    return own, [text for text in inherited.split(", ") if text]


_LEARNED = "; learned from weights under "

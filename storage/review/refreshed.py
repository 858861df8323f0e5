"""The last refresh of the review queue: ``review/refreshed.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from storage.errors import ObjectNotFound
from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsPut

REFRESHED_KEY = "review/refreshed.json"


@dataclass(frozen=True, slots=True)
class Refreshed:
    """Replaces the policy and the display rule of all earlier queue parts.

    Attributes:
        made_at: ISO 8601, UTC.
        policy, show: as in ``QueueHead``.
        closed: image ids by sha256 of images that are no longer pushed for review.
    """

    made_at: str
    policy: dict[str, Any]
    show: dict[str, Any]
    closed: Mapping[str, str] = field(default_factory=dict)


class SupportsRefreshed(SupportsGet, SupportsPut, Protocol):
    """The store verbs needed to keep the record."""


def read_refreshed(store: SupportsGet) -> Refreshed | None:
    """Return the last refresh, or None. Raises StorageError if the record is damaged."""
    try:
        return read_record(store, REFRESHED_KEY, lambda fields: Refreshed(**fields))
    except ObjectNotFound:
        return None


def write_refreshed(store: SupportsRefreshed, refreshed: Refreshed) -> None:
    """Replace the record."""
    store.put(REFRESHED_KEY, json_record(asdict(refreshed)))

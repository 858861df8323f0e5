"""Queued images that could not be shown to people: ``review/not_shown.json``, by the last push."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from storage.errors import ObjectNotFound
from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsPut

NOT_SHOWN_KEY = "review/not_shown.json"


class SupportsNotShown(SupportsGet, SupportsPut, Protocol):
    """The store verbs needed to keep the record."""


def read_not_shown(store: SupportsGet) -> dict[str, str]:
    """Return why an image could not be shown, by sha256. Raises StorageError when damaged."""
    try:
        return read_record(store, NOT_SHOWN_KEY, lambda fields: dict(fields["images"]))
    except ObjectNotFound:
        return {}


def write_not_shown(store: SupportsNotShown, images: Mapping[str, str]) -> None:
    """Replace the record where it differs."""
    if read_not_shown(store) != dict(images):
        store.put(NOT_SHOWN_KEY, json_record({"images": dict(images)}))

"""Answers that count although they were deleted in Label Studio: ``review/kept.json``.

Who deletes a finished project rarely means to lose its labels. `review pull --keep-answers` writes
here, once, which deletions are known and change nothing; later pulls then have nothing to say.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Protocol

from storage.errors import ObjectNotFound
from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsPut
from storage.review.answers import Annotation

KEPT_KEY = "review/kept.json"


class SupportsKept(SupportsGet, SupportsPut, Protocol):
    """The store verbs needed to keep the record."""


def read_kept(store: SupportsGet) -> frozenset[Annotation]:
    """Return which annotations count on. Raises StorageError when the record is damaged."""
    try:
        return read_record(store, KEPT_KEY, _annotations)
    except ObjectNotFound:
        return frozenset()


def _annotations(fields: dict[str, Any]) -> frozenset[Annotation]:
    return frozenset(
        (str(project), str(sha256), int(task), int(annotation))
        for project, sha256, task, annotation in fields["annotations"]
    )


def keep_answers(store: SupportsKept, more: Set[Annotation]) -> None:
    """Add annotations to the record."""
    known = read_kept(store)
    if not more <= known:
        store.put(KEPT_KEY, json_record({"annotations": sorted(known | more)}))


def forget_kept(store: SupportsKept, gone: Set[Annotation]) -> None:
    """Take annotations out of the record: what their deletion means is asked anew."""
    known = read_kept(store) if gone else frozenset()
    if known & gone:
        store.put(KEPT_KEY, json_record({"annotations": sorted(known - gone)}))

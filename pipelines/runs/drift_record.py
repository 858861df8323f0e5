"""What the last labelling runs found of drift: ``report/drift.json``, read by `status`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from storage.errors import ObjectNotFound, StorageError
from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsPut

DRIFT_KEY = "report/drift.json"


class SupportsDriftRecord(SupportsGet, SupportsPut, Protocol):
    """What keeping the record needs of a store."""


@dataclass(frozen=True, slots=True)
class DriftRecord:
    """The state of a run's comparison with itself.

    Attributes:
        checked_at: ISO 8601, UTC, of the last comparison. ``sentence``: what it found.
        reference_from, reference: the listings from the one (counted from 0) up to, without, the
            other are the reference; later ones are tested against them.
        listings: that were compared.
        alarm_at: of the last alarm, '' if there was none; ``alarm``: what it said.
    """

    checked_at: str
    sentence: str
    reference_from: int
    reference: int
    listings: int
    alarm_at: str = ""
    alarm: str = ""

    @property
    def alarmed(self) -> bool:
        """Whether the last comparison was an alarm."""
        return bool(self.alarm_at) and self.alarm_at == self.checked_at


def read_drift(store: SupportsGet) -> DriftRecord | None:
    """Read the record; None before a comparison. Raises StorageError when it is damaged."""
    try:
        return read_record(store, DRIFT_KEY, _record)
    except ObjectNotFound:
        return None


def known_drift(store: SupportsGet) -> DriftRecord | None:
    """Read the record; None also when it is damaged, since the next labelling run replaces it."""
    try:
        return read_drift(store)
    except StorageError:
        return None


def write_drift(store: SupportsDriftRecord, record: DriftRecord) -> None:
    """Keep the record."""
    store.put(DRIFT_KEY, json_record(asdict(record)))


def _record(fields: Mapping[str, Any]) -> DriftRecord:
    return DriftRecord(
        checked_at=str(fields["checked_at"]),
        sentence=str(fields["sentence"]),
        reference_from=int(fields["reference_from"]),
        reference=int(fields["reference"]),
        listings=int(fields["listings"]),
        alarm_at=str(fields.get("alarm_at", "")),
        alarm=str(fields.get("alarm", "")),
    )

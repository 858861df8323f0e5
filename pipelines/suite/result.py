"""What a suite measured: one record a data set, and the means over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from storage.errors import ObjectNotFound, StorageError
from storage.objects.json_records import json_record, read_record
from storage.objects.protocols import SupportsGet, SupportsPut

RESULT_KEY = "result.json"


@dataclass(frozen=True, slots=True)
class SetResult:
    """One data set as measured, or why it could not be.

    Attributes:
        fingerprint: 16 hex digits of all that decides the figures; a result counts for it alone.
        domain: '' where none is stated.
        images: test images that were measured. ``classes``: of the ground truth.
        map_, map50: mAP@0.5:0.95 and mAP@0.5 in [0, 1]; None where the truth has no object, or
            the data set failed.
        train_seconds: 0 where nothing was trained. ``label_seconds``: that
            workers spent on its run, all stages.
        checkpoint: that was measured. ``error``: why the set failed; ''.
        remark: images or classes that were left out; ''.
    """

    name: str
    domain: str
    fingerprint: str
    images: int = 0
    classes: int = 0
    map_: float | None = None
    map50: float | None = None
    train_seconds: float = 0.0
    label_seconds: float = 0.0
    checkpoint: str = ""
    error: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Mean:
    """Means over data sets, each set counted once, as in RF100."""

    name: str
    sets: int
    map_: float
    map50: float


@dataclass(frozen=True, slots=True)
class SuiteSummary:
    """A suite after one invocation.

    Attributes:
        sets: in the order of the config.
        domains: means by domain, in the order of their first set; sets without one are in none.
        mean: over all sets that were measured; None: there is none yet.
        new: sets that were measured in this invocation.
    """

    name: str
    output: str
    sets: tuple[SetResult, ...]
    domains: tuple[Mean, ...]
    mean: Mean | None
    new: int

    @staticmethod
    def of(name: str, output: str, sets: Sequence[SetResult], new: int) -> SuiteSummary:
        """Average what was measured."""
        by_domain: dict[str, list[SetResult]] = {}
        for one in sets:
            if one.domain:
                by_domain.setdefault(one.domain, []).append(one)
        means = (_mean(domain, those) for domain, those in by_domain.items())
        domains = tuple(mean for mean in means if mean is not None)
        return SuiteSummary(name, output, tuple(sets), domains, _mean("all", sets), new)

    @property
    def exit_code(self) -> int:
        """0: every data set is measured; 3: some failed."""
        return 3 if any(one.error for one in self.sets) else 0

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON, under COCO's customary names."""
        return {name: _named(value) for name, value in asdict(self).items()} | {
            "exit_code": self.exit_code
        }


def _named(value: Any) -> Any:
    names = {"map_": "mAP", "map50": "mAP50"}
    if isinstance(value, Mapping):
        return {names.get(key, key): _named(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    return value


def _mean(name: str, sets: Sequence[SetResult]) -> Mean | None:
    measured = [(one.map_, one.map50) for one in sets if not one.error]
    known = [(a, b) for a, b in measured if a is not None and b is not None]
    if not known:
        return None
    return Mean(name, len(known), fmean(a for a, _ in known), fmean(b for _, b in known))


def read_result(store: SupportsGet, fingerprint: str) -> SetResult | None:
    """Return the record of a data set that was measured with this fingerprint, else None."""
    try:
        found = read_record(store, RESULT_KEY, lambda fields: SetResult(**fields))
    except (ObjectNotFound, StorageError):
        return None  # not measured yet, or a damaged record: the measurement is repeated
    return found if found.fingerprint == fingerprint and not found.error else None


def write_result(store: SupportsPut, result: SetResult) -> None:
    """Keep the record; it is written last, so a data set that has one is done."""
    store.put(RESULT_KEY, json_record(asdict(result)))

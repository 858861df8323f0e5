"""What verify found: the record, its differences and its exit code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_KEPT = 10_000  # differences that are kept as sentences; all are counted


@dataclass(frozen=True, slots=True)
class Difference:
    """A broken promise. ``shard_id`` is '' where it does not concern a shard."""

    key: str
    shard_id: str
    what: str


@dataclass(frozen=True, slots=True)
class Orphan:
    """An object below annotations/ that belongs to no live shard."""

    key: str
    nbytes: int
    why: str


@dataclass(slots=True)
class Verification:
    """What verify found. Shards: ``listed = committed + quarantined + left``.

    Attributes:
        images, detections: rows and boxes in the live shards' objects, tombstoned ones included;
            as their footers say where ``quick``.
        nbytes: of those objects.
        tars_reread: tars whose members were read again from the source.
        images_rehashed: images whose bytes were compared with their row.
        images_changed: images that could not be, since they changed or are gone.
        label_versions, queue_parts, answer_parts, model_files: objects beside the rows.
        unsealed: objects without a checksum, as older versions wrote them.
        orphans: unused objects; those that a later listing dropped are not differences, `gc`
            removes them.
        remarks: worth knowing, but not differences.
        differences: the first ten thousand. ``found``: all of them.
    """

    url: str
    name: str
    complete: bool
    quick: bool = False
    listed: int = 0
    committed: int = 0
    quarantined: int = 0
    left: int = 0
    images: int = 0
    detections: int = 0
    nbytes: int = 0
    tars_reread: int = 0
    images_rehashed: int = 0
    images_changed: int = 0
    label_versions: int = 0
    queue_parts: int = 0
    answer_parts: int = 0
    model_files: int = 0
    unsealed: int = 0
    orphans: list[Orphan] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    found: int = 0

    @property
    def clean(self) -> bool:
        """Nothing differs."""
        return not self.found

    @property
    def exit_code(self) -> int:
        """For the process."""
        return 0 if self.clean else 1

    def differs(self, key: str, shard_id: str, what: str) -> None:
        """Note a difference."""
        self.found += 1
        if len(self.differences) < _KEPT:
            self.differences.append(Difference(key, shard_id, what))

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"clean": self.clean, **asdict(self)}

"""Compare two label versions: ``labelfleet diff RUN V1 V2``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from pipelines.truth.matching import iou_matrix, match
from storage.errors import StorageError
from storage.labels.rows import Label, LabelRow, label_rows
from storage.labels.versions import LabelVersion, read_label_tables, read_version
from storage.runs.manifest import Manifest

_EXAMPLES = 20
_SAME_PX = 0.01  # float32 rounding, not a move


@dataclass(frozen=True, slots=True)
class LabelDiff:
    """Differences from ``old`` to ``new``.

    Attributes:
        old, new: versions.
        policies: (old, new) digests; model likewise.
        images: added, removed, changed, unchanged; to_human, to_model: whose labels they are.
            An image whose pixels changed is removed and added.
        boxes: on images in both: added, removed, moved (same class, IoU >= 0.5), relabelled,
            to_label (was ignored), to_ignore (was a label), unchanged.
        labels_by_class: (old, new) counts of labels by class name, ignore boxes left out.
        examples: ids of the first changed images.
    """

    old: str
    new: str
    policies: tuple[str, str]
    models: tuple[str, str]
    images: dict[str, int]
    boxes: dict[str, int]
    labels_by_class: dict[str, tuple[int, int]]
    examples: tuple[str, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


IMAGE_KINDS = ("added", "removed", "changed", "unchanged", "to_human", "to_model")
BOX_KINDS = (
    "added", "removed", "moved", "relabelled", "to_label", "to_ignore", "unchanged",
)  # fmt: skip


def diff_versions(manifest: Manifest, old: str, new: str) -> LabelDiff:
    """Compare two versions of one run, shard by shard.

    Args:
        manifest: the run.
        old, new: version names, or ``latest``.

    Raises:
        ConfigError: the version does not exist.
    """
    before, after = read_version(manifest.store, old), read_version(manifest.store, new)
    tally = _Tally([c.name for c in before.categories], [c.name for c in after.categories])
    for a, b in _aligned(manifest, before, after):
        tally.shard(a, b)
    names = dict.fromkeys([*tally.old_names, *tally.new_names])
    return LabelDiff(
        old=before.version,
        new=after.version,
        policies=(before.policy, after.policy),
        models=(before.run["model_sha256"], after.run["model_sha256"]),
        images={kind: tally.images[kind] for kind in IMAGE_KINDS},
        boxes={kind: tally.boxes[kind] for kind in BOX_KINDS},
        labels_by_class={n: (tally.old_labels[n], tally.new_labels[n]) for n in names},
        examples=tuple(tally.examples),
    )


@dataclass(slots=True)
class _Tally:
    old_names: list[str]
    new_names: list[str]
    images: Counter[str] = field(default_factory=Counter)
    boxes: Counter[str] = field(default_factory=Counter)
    old_labels: Counter[str] = field(default_factory=Counter)
    new_labels: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def shard(self, old: list[LabelRow], new: list[LabelRow]) -> None:
        """Count one shard's images as they are in either version."""
        self.old_labels.update(self.old_names[x.category_id] for r in old for x in r.accepted)
        self.new_labels.update(self.new_names[x.category_id] for r in new for x in r.accepted)
        before = {(r.image_id, r.sha256): r for r in old}
        after = {(r.image_id, r.sha256): r for r in new}
        self.images["removed"] += len(before.keys() - after.keys())
        self.images["added"] += len(after.keys() - before.keys())
        for key in before:
            if key in after:
                self._image(before[key], after[key])

    def _image(self, old: LabelRow, new: LabelRow) -> None:
        if old.source != new.source:
            self.images[f"to_{new.source}"] += 1
        changes = self._box_changes(old.labels, new.labels)
        self.boxes.update(changes)
        changed = old.source != new.source or any(changes[k] for k in BOX_KINDS[:-1])
        self.images["changed" if changed else "unchanged"] += 1
        if changed and len(self.examples) < _EXAMPLES:
            self.examples.append(new.image_id)

    def _box_changes(self, old: tuple[Label, ...], new: tuple[Label, ...]) -> Counter[str]:
        iou = iou_matrix(_corners(new), _corners(old))
        same = np.array(
            [
                [self.new_names[n.category_id] == self.old_names[o.category_id] for o in old]
                for n in new
            ],
            np.bool_,
        ).reshape(iou.shape)
        found: Counter[str] = Counter()
        for allowed, kind in ((same, ""), (~same, "relabelled")):
            rows, columns = match(np.where(allowed, iou, 0.0), 0.5)
            for row, column in zip(rows, columns, strict=True):
                found[kind or _same_class(old[column], new[row])] += 1
            iou[rows] = 0.0
            iou[:, columns] = 0.0
        paired = found.total()
        found["added"], found["removed"] = len(new) - paired, len(old) - paired
        return found


def _same_class(old: Label, new: Label) -> str:
    if old.ignore != new.ignore:
        return "to_ignore" if new.ignore else "to_label"
    return "unchanged" if np.allclose(old.bbox, new.bbox, atol=_SAME_PX, rtol=0) else "moved"


def _corners(labels: tuple[Label, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.array([label.bbox for label in labels], np.float64).reshape(-1, 4)


def _aligned(
    manifest: Manifest, old: LabelVersion, new: LabelVersion
) -> Iterator[tuple[list[LabelRow], list[LabelRow]]]:
    """Both versions' rows by shard. Both are in listing order, so a shard in both comes in step."""
    in_old, in_new = _shards(manifest, old), _shards(manifest, new)
    a, b = _by_shard(manifest, old), _by_shard(manifest, new)
    left, right = next(a, None), next(b, None)
    while left is not None or right is not None:
        if left is not None and left[0] not in in_new:
            yield left[1], []
            left = next(a, None)
        elif right is not None and right[0] not in in_old:
            yield [], right[1]
            right = next(b, None)
        elif left is not None and right is not None and left[0] == right[0]:
            yield left[1], right[1]
            left, right = next(a, None), next(b, None)
        else:
            raise StorageError(
                f"{old.version} and {new.version} hold their shards in different orders",
                hint="they are not of one run's listing; was labels/ copied from elsewhere?",
            )


def _shards(manifest: Manifest, version: LabelVersion) -> set[str]:
    found: set[str] = set()
    for table in read_label_tables(manifest.store, version, ["shard_id"]):
        found.update(table.column("shard_id").unique().to_pylist())
    return found


def _by_shard(manifest: Manifest, version: LabelVersion) -> Iterator[tuple[str, list[LabelRow]]]:
    tables = read_label_tables(manifest.store, version)
    rows = (row for table in tables for row in label_rows(table))
    for shard_id, of_shard in groupby(rows, key=lambda row: row.shard_id):
        yield shard_id, list(of_shard)

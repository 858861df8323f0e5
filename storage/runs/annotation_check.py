"""Check that an annotation object matches its footer and the images listed for its shard.

The whole object is read and its checksums verified. Every problem found is reported as a sentence,
not only the first; ``ObjectCheck`` also holds the counts of an object that can be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import StorageError
from storage.objects.protocols import SupportsGetRange
from storage.parquet.errors import reading_parquet
from storage.parquet.files import metadata_of, opened, read_metadata
from storage.records import (
    STATUSES,
    RunIdentity,
    Shard,
    StoredObject,
    image_id_of,
    image_ids_of,
    printable,
)
from storage.runs.annotation_rows import SCHEMA, untrue_values
from storage.runs.annotations import ShardFooter, footer_of, identity_of

_NAMED = 3  # images named in one sentence


@dataclass(slots=True)
class ObjectCheck:
    """The contents of one object, and everything wrong with it.

    Attributes:
        readable: to its end; if not, the counts are incomplete.
        footer: None if it cannot be read.
        counts: rows by status, as counted. ``detections``: boxes, as counted.
        sealed: whether it carries a checksum of the whole object.
        problems: sentences; empty if the object is correct.
    """

    readable: bool = False
    footer: ShardFooter | None = None
    counts: Counter[str] = field(default_factory=Counter)
    detections: int = 0
    sealed: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Rows."""
        return self.counts.total()

    def totals(self) -> tuple[int, ...]:
        """Return rows by STATUSES, then boxes."""
        return (*(self.counts.get(status, 0) for status in STATUSES), self.detections)


def check_object(
    raw: bytes, key: str, shard: Shard, run: RunIdentity, *, framed: bool = False
) -> ObjectCheck:
    """Check one annotation object; damage is reported, never raised.

    Args:
        raw: the object.
        key: its key, for messages.
        shard: as it was listed.
        run: as run.json has it.
        framed: whether a file may have a row for each of its frames.
    """
    check = ObjectCheck()
    ids: list[str] = []
    shard_ids: set[str] = set()
    try:
        with opened(raw, key) as file:
            metadata = metadata_of(file, key)
            check.sealed = "seal" in metadata
            check.footer = footer_of(metadata, key)
            check.problems += _about_identity(identity_of(metadata), run)
            check.problems += _about_columns(file.schema_arrow)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                table.validate(full=True)
                ids += table.column("image_id").to_pylist()
                shard_ids.update(table.column("shard_id").unique().to_pylist())
                check.counts.update(table.column("status").to_pylist())
                boxes = pc.sum(pc.list_value_length(table.column("detections"))).as_py()
                check.detections += boxes or 0
                check.problems += untrue_values(table, len(run.categories))
    except StorageError as exc:
        check.problems.append(exc.message)
        return check
    check.readable = True
    check.problems += _about_footer(check, check.footer, shard)
    check.problems += _about_counts(check, check.footer)
    check.problems += _about_rows(ids, shard_ids, check, shard, framed)
    return check


def check_footer(
    store: SupportsGetRange, listed: StoredObject, shard: Shard, run: RunIdentity
) -> ObjectCheck:
    """Check the footer of an annotation object, without its rows.

    The counts are the footer's. Raises ObjectNotFound, ObjectChanged, or the error of an outage.
    """
    check = ObjectCheck()
    try:
        metadata, check.sealed = read_metadata(store, listed)
        check.footer = footer_of(metadata, listed.key)
        with reading_parquet(listed.key):
            check.problems += _about_identity(identity_of(metadata), run)
    except StorageError as exc:
        if type(exc) is not StorageError:
            raise
        check.problems.append(exc.message)
        return check
    check.readable = True
    check.counts = Counter({status: n for status, n in check.footer.counts.items() if n})
    check.detections = check.footer.detections
    check.problems += _about_footer(check, check.footer, shard)
    return check


def _about_columns(schema: pa.Schema) -> Iterator[str]:
    if foreign := [name for name in schema.names if name not in SCHEMA.names]:
        yield f"columns that labelfleet does not write: {some(foreign)}"
    lacking = [f.name for f in SCHEMA if not f.nullable and f.name not in schema.names]
    if lacking:
        yield f"columns that are missing: {some(lacking)}"


def _about_identity(found: RunIdentity, run: RunIdentity) -> Iterator[str]:
    # A newer labelfleet may continue a run; everything else is fixed for the run.
    if replace(found, code_version=run.code_version) != run:
        yield "it was written for another run: model, classes or settings are not those of run.json"


def _about_footer(check: ObjectCheck, footer: ShardFooter, shard: Shard) -> Iterator[str]:
    if footer.shard_id != shard.shard_id:
        yield f"its footer is that of shard {footer.shard_id}"
    elif footer.shard_key != shard.key:
        yield f"its footer names {printable(footer.shard_key)}, the listing {printable(shard.key)}"


def _about_counts(check: ObjectCheck, footer: ShardFooter) -> Iterator[str]:
    said = {status: n for status, n in footer.counts.items() if n}
    if said != dict(check.counts):
        yield f"it has {_told(check.counts)}, its footer says {_told(said)}"
    if footer.detections != check.detections:
        yield f"it has {check.detections} boxes, its footer says {footer.detections}"


def _told(counts: Counter[str] | dict[str, int]) -> str:
    known = [s for s in STATUSES if counts.get(s)] + sorted(counts.keys() - set(STATUSES))
    return ", ".join(f"{counts[status]} {status}" for status in known) or "no rows"


def _about_rows(
    ids: list[str],
    shard_ids: set[str],
    check: ObjectCheck,
    shard: Shard,
    framed: bool,
) -> Iterator[str]:
    if foreign := sorted(shard_ids - {shard.shard_id}):
        yield f"rows of another shard: {some(foreign)}"
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        yield f"images twice: {some(twice)}"
    if shard.kind == "images":
        files = _without_frames(ids) if framed else ids
        yield from _compared(files, _expected(files, shard))
    elif not _is_missing_tar(ids, check, shard):
        prefixes = (f"{printable(shard.key)}/", f"{image_ids_of(shard.key)[-1]}/")
        if outside := [i for i in ids if not i.startswith(prefixes)]:
            yield f"images that are not of this tar: {some(outside)}"


def _without_frames(ids: Sequence[str]) -> list[str]:
    """Return the ids of the files: without those of frames 2, 3, … that follow a file in order."""
    files: list[str] = []
    number = 1
    for image_id in ids:
        if files and image_id == f"{files[-1]}#{number + 1}":
            number += 1
        else:
            files.append(image_id)
            number = 1
    return files


def _expected(ids: list[str], shard: Shard) -> list[str]:
    """Return the ids of a group of loose images, as written now or by an older version."""
    at_all = set(ids)
    return [
        next((i for i in image_ids_of(o.key) if i in at_all), image_id_of(o.key))
        for o in shard.objects
    ]


def _is_missing_tar(ids: list[str], check: ObjectCheck, shard: Shard) -> bool:
    """Return whether the tar was missing or replaced when read: one row under the tar's name."""
    return ids in [[name] for name in image_ids_of(shard.key)] and check.counts == Counter(
        missing=1
    )


def _compared(ids: list[str], expected: Sequence[str]) -> Iterator[str]:
    if ids == list(expected):
        return
    found, wanted = set(ids), set(expected)
    if lacking := [i for i in expected if i not in found]:
        yield f"images of the shard that have no row: {some(lacking)}"
    if extra := [i for i in ids if i not in wanted]:
        yield f"images that are not of the shard: {some(extra)}"
    if not lacking and not extra and len(ids) == len(expected):
        yield "its rows are not in the order of the shard"


def some(names: Sequence[str]) -> str:
    """Return the first few names and the number of others."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"

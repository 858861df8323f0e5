"""The review queue and the answers: who should look at what, why, and what they said.

``review/queue/<n>.parquet``    what one routing drew; rows are ``ReviewItem``, ordered to be shown.
``review/answers/<n>.parquet``  what one pull brought back; rows are ``Answer``.

Parts are created whole and once, and never changed. Boxes are xyxy in pixels of the upright image,
as in the annotation rows. Classes go by name in answers, so that they outlive a checkpoint whose
classes are numbered otherwise; images go by sha256, so that an answer never reaches other pixels
under an old name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from storage.errors import AlreadyExists, ReviewError
from storage.objects.protocols import SupportsCreate, SupportsGet, SupportsList
from storage.parquet.errors import reading_parquet
from storage.parquet.parts import (
    SupportsParts,
    create_part,
    part_key,
    part_keys,
    read_header,
    read_parts,
)
from storage.records import ImageRef

QUEUE = "review/queue/"
VERSION = 1

Part = Literal["audit", "value"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an image was routed: a signal's name and what it saw, in expected corrections.

    ``audit`` and ``rare_class`` are names too; ``note`` is a short text for people.
    """

    signal: str
    amount: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class ReviewItem(ImageRef):
    """One image in the queue.

    Attributes:
        phash, width, height: as in the annotation row.
        order: place in this part's queue, from 0; show them in this order.
        part: ``audit`` (drawn at random) or ``value`` (expected to pay).
        show: False where the same pixels are in the queue already, under this name or another,
            and the answer to those counts for this audit item too. Such an item is not pushed.
        stratum: invocation that first saw the image; audit items of a stratum are a simple
            random sample of its live images.
        audit_rank: place in the stratum's random order, from 0; -1 for ``value``.
        inclusion: probability of being drawn for the audit, as of this part; 0 for ``value``.
        value: corrections expected, weighted by signal.
        seconds: human time expected, by the cost model of the part.
        reasons: what spoke for it, strongest first.
    """

    phash: int | None
    width: int
    height: int
    order: int
    part: Part
    show: bool
    stratum: str
    audit_rank: int
    inclusion: float
    value: float
    seconds: float
    reasons: tuple[Reason, ...]


_REASON = pa.struct([("signal", pa.string()), ("amount", pa.float64()), ("note", pa.string())])
QUEUE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.uint64()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("order", pa.int32(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("show", pa.bool_(), nullable=False),
        pa.field("stratum", pa.string(), nullable=False),
        pa.field("audit_rank", pa.int64(), nullable=False),
        pa.field("inclusion", pa.float64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("reasons", pa.list_(_REASON), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Stratum:
    """One stratum as a part found it.

    Attributes:
        name: the invocation that first saw its shards.
        images: live images in it (the population).
        drawn: audit items drawn from it so far, this part included: ranks 0 to drawn - 1.
    """

    name: str
    images: int
    drawn: int


@dataclass(frozen=True, slots=True)
class QueueHead:
    """What a queue part says about the routing that made it.

    Attributes:
        invocation: who routed; one part each.
        made_at: ISO 8601, UTC.
        seed: of the audit's random order and of places in the queue.
        budget: as given, ``500 images`` or ``240 minutes``.
        audit: share of the budget drawn at random.
        cost: seconds per image, per box shown, per correction, and where they come from.
        policy: thresholds (and calibration) the value was computed at, as in policy.yaml.
        model_sha256: the model whose rows were read.
        strata: every stratum known after this routing.
        frame: key of the list of shards first seen here (storage/review/frames.py); '' if none.
        passed_over: images not routed and why: counts by reason.
        show: which boxes people see, see ``routing.showing.ShowRule``; empty in parts of older
            versions, which show everything from ``reject`` up.
    """

    invocation: str
    made_at: str
    seed: int
    budget: str
    audit: float
    cost: dict[str, Any]
    policy: dict[str, Any]
    model_sha256: str
    strata: tuple[Stratum, ...]
    frame: str = ""
    passed_over: dict[str, int] = field(default_factory=dict)
    show: dict[str, Any] = field(default_factory=dict)


def queue_parts(store: SupportsList) -> list[str]:
    """Return keys of the queue's parts, oldest first."""
    return part_keys(store, QUEUE)


def write_queue(
    store: SupportsCreate, number: int, head: QueueHead, items: Sequence[ReviewItem]
) -> str:
    """Create queue part ``number``; returns its key.

    Raises:
        ReviewError: another process routed meanwhile, so it may have drawn these items as well.
    """
    table = pa.Table.from_pylist([asdict(item) for item in items], schema=QUEUE_SCHEMA)
    header = {"schema_version": VERSION, "queue": asdict(head)}
    try:
        return create_part(store, QUEUE, number, table, header)
    except AlreadyExists as exc:
        raise ReviewError(
            f"{part_key(QUEUE, number)} was written by another routing in the meantime",
            hint="route again: what the other one drew is then left out",
        ) from exc


def read_head(store: SupportsGet, key: str) -> QueueHead:
    """Return what the queue part at ``key`` says about its routing."""
    header = read_header(store, key)
    with reading_parquet(key):
        values = header["queue"]
        strata = tuple(Stratum(**s) for s in values.pop("strata"))
        return QueueHead(**values, strata=strata)


def read_queue(
    store: SupportsParts, keys: Sequence[str] | None = None, *, hidden: bool = False
) -> Iterator[ReviewItem]:
    """Yield items of the queue in the order they are to be shown, part by part.

    Args:
        store: the run's output.
        keys: parts to read, or None for all.
        hidden: also those with ``show`` False (for estimates; never push them).
    """
    parts = queue_parts(store) if keys is None else keys
    for item in read_parts(store, parts, QUEUE_SCHEMA, _item):
        if item.show or hidden:
            yield item


def _item(row: dict[str, Any]) -> ReviewItem:
    return ReviewItem(**{**row, "reasons": tuple(Reason(**r) for r in row["reasons"])})


IMAGES = "review/images/"

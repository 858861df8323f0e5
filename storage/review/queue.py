"""The review queue: which images people should review, in what order, and why.

``review/queue/<n>.parquet``    the items of one routing; rows are ``ReviewItem``, in display order.
``review/answers/<n>.parquet``  the answers of one pull; rows are ``Answer``.

Parts are created whole, once, and never changed. Boxes are xyxy in pixels of the upright image,
as in the annotation rows. Answers identify classes by name, so that they survive a checkpoint with
different class numbers, and images by sha256, so that an answer never applies to other pixels under
an old name.
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

Part = Literal["audit", "value", "gold"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an image was routed: a signal's name and its value in expected corrections.

    ``audit`` and ``rare_class`` are also used as names; ``note`` is a short explanation.
    """

    signal: str
    amount: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class ReviewItem(ImageRef):
    """One image in the queue.

    Attributes:
        image_id, shard_id, offset, nbytes: as in the annotation row; locate the bytes.
        sha256, phash, width, height: as in the annotation row.
        order: position in this part's queue, from 0; the display order.
        part: ``audit`` (drawn at random), ``value`` (drawn for its expected corrections) or
            ``gold`` (its boxes are known, see ``storage.review.gold``).
        show: False where the same pixels are already queued, under this or another name, so that
            their answer counts for this audit item too. Such an item is not pushed.
        stratum: invocation that first saw the image; audit items of a stratum are a simple
            random sample of its live images.
        audit_rank: position in the stratum's random order, from 0; -1 for the others.
        inclusion: probability of being drawn for the audit, as of this part; 0 for the others.
        value: expected corrections, weighted by signal.
        seconds: expected human time, by the cost model of the part.
        reasons: why it was selected, strongest first.
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
    """One stratum as of a queue part.

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
    """The header of a queue part: the routing that made it.

    Attributes:
        invocation: id of the routing invocation; each writes one part.
        made_at: ISO 8601, UTC.
        seed: for the audit's random order and for positions in the queue.
        budget: as given, ``500 images`` or ``240 minutes``.
        audit: share of the budget drawn at random.
        cost: seconds per image, per box shown, per correction, and the source of these numbers.
        policy: thresholds (and calibration) used to compute the value, as in policy.yaml.
        model_sha256: the model whose rows were read.
        strata: every stratum known after this routing.
        frame: key of the list of shards first seen here (storage/review/frames.py); '' if none.
        passed_over: number of images not routed, by reason.
        show: which boxes people see (``routing.showing.ShowRule``); empty in parts of older
            versions, which show every box with a score of at least ``reject``.
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
    """Return the keys of the queue parts, oldest first."""
    return part_keys(store, QUEUE)


def write_queue(
    store: SupportsCreate, number: int, head: QueueHead, items: Sequence[ReviewItem]
) -> str:
    """Create queue part ``number`` and return its key.

    Raises:
        ReviewError: another routing finished meanwhile and may contain the same items.
    """
    table = pa.Table.from_pylist([asdict(item) for item in items], schema=QUEUE_SCHEMA)
    header = {"schema_version": VERSION, "queue": asdict(head)}
    try:
        return create_part(store, QUEUE, number, table, header)
    except AlreadyExists as exc:
        raise ReviewError(
            f"{part_key(QUEUE, number)} was written by another routing in the meantime",
            hint="route again: the items of the other routing are then left out",
        ) from exc


def read_head(store: SupportsGet, key: str) -> QueueHead:
    """Read the header of the queue part at ``key``."""
    header = read_header(store, key)
    with reading_parquet(key):
        values = header["queue"]
        strata = tuple(Stratum(**s) for s in values.pop("strata"))
        return QueueHead(**values, strata=strata)


def read_queue(
    store: SupportsParts, keys: Sequence[str] | None = None, *, hidden: bool = False
) -> Iterator[ReviewItem]:
    """Yield the queue's items in display order, part by part.

    Args:
        store: the run's output.
        keys: parts to read, or None for all.
        hidden: include items with ``show`` False (for estimates; never push them).
    """
    parts = queue_parts(store) if keys is None else keys
    for item in read_parts(store, parts, QUEUE_SCHEMA, _item):
        if item.show or hidden:
            yield item


def _item(row: dict[str, Any]) -> ReviewItem:
    return ReviewItem(**{**row, "reasons": tuple(Reason(**r) for r in row["reasons"])})


IMAGES = "review/images/"

"""Label versions: merged label sets below ``labels/<version>/``, immutable once they exist.

    labels/v0001/claim.json            who writes this version; taken by one conditional put
    labels/v0001/part-000000.parquet   rows, one an image, in listing order
    labels/v0001/policy.yaml           the policy that judged the model's boxes
    labels/v0001/answered.jsonl        what the answers say about the model's labels, per image
    labels/v0001/alternatives.jsonl    boxes that yielded to a likelier box of the same object
    labels/v0001/lineage.json          written last: the version exists when this does
    labels/latest.json                 pointer to the newest version, moved by conditional replace

A label is a box that is right by policy or by a person; an ``ignore`` box is neither object nor
background. Boxes are xyxy in pixels of the upright image.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import (
    AlreadyExists,
    ConfigError,
    ObjectChanged,
    ObjectNotFound,
    StorageError,
)
from storage.objects.protocols import (
    SupportsCreate,
    SupportsGet,
    SupportsHead,
    SupportsList,
    SupportsReplace,
)
from storage.parquet.files import METADATA_KEY
from storage.records import Category

LABELS = "labels/"
LATEST = "labels/latest.json"
VERSION = 1

LABEL_TYPE = pa.struct(
    [
        pa.field("bbox", pa.list_(pa.float32(), 4), nullable=False),
        pa.field("category_id", pa.int16(), nullable=False),
        pa.field("score", pa.float32()),  # null: a person drew it
        pa.field("ignore", pa.bool_(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),  # model, kept, moved, relabelled, added
    ]
)
LABEL_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # model, human
        pa.field(
            "labels", pa.list_(pa.field("element", LABEL_TYPE, nullable=False)), nullable=False
        ),
        pa.field("rejected", pa.int32(), nullable=False),  # boxes the policy dropped
        pa.field("model", pa.string(), nullable=False),  # sha256 of the weights
        pa.field("policy", pa.string(), nullable=False),  # digest of policy.yaml
        pa.field("annotator", pa.string()),  # null: nobody
        pa.field("labelled_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class PartFile:
    """One Parquet object of a version."""

    key: str
    rows: int


@dataclass(frozen=True, slots=True)
class LabelVersion:
    """What lineage.json says: where a version comes from and what is in it.

    Attributes:
        version: ``v0001``, counted up; numbers may be missing where a writer died.
        attempt: who wrote it; tells a lost reply from a rival.
        created_at: ISO 8601, UTC.
        run: its output URL's name and model: name, model_sha256, config_hash, licence.
        categories: classes with their official ids.
        policy: digest of policy.yaml.
        settling: how several answers to one image were settled, ``latest`` or ``agreement``.
        answers: answer parts that were read, by run URL.
        counts: images by source, labels, ignored and rejected boxes, images left out by status,
            answers by what became of them. Of the rejected boxes, ``rejected_outside`` have no
            area in their image and ``rejected_alternative`` yielded to a box of the same object.
        parts: its Parquet objects in order.
    """

    version: str
    attempt: str
    created_at: str
    run: dict[str, str]
    categories: tuple[Category, ...]
    policy: str
    settling: str
    answers: dict[str, list[str]]
    counts: dict[str, int]
    parts: tuple[PartFile, ...] = field(default_factory=tuple)

    @property
    def prefix(self) -> str:
        """Where its objects lie."""
        return f"{LABELS}{self.version}/"

    def to_json(self) -> bytes:
        """lineage.json."""
        return json.dumps({"schema_version": VERSION, **asdict(self)}, indent=2).encode()

    @staticmethod
    def from_json(raw: bytes) -> LabelVersion:
        """The inverse of ``to_json``. Raises StorageError when it is damaged."""
        try:
            fields = json.loads(raw)
            fields.pop("schema_version")
            categories = tuple(Category(**c) for c in fields.pop("categories"))
            parts = tuple(PartFile(**p) for p in fields.pop("parts"))
            return LabelVersion(categories=categories, parts=parts, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise StorageError(f"a lineage.json cannot be read: {exc}") from exc


class SupportsVersions(
    SupportsList, SupportsGet, SupportsHead, SupportsCreate, SupportsReplace, Protocol
):
    """What writing versions needs of a store."""


class SupportsReadVersions(SupportsList, SupportsGet, Protocol):
    """What reading versions needs of a store."""


def claim_version(store: SupportsVersions, attempt: str) -> str:
    """Take the next free version number; nobody else gets it, even if we die."""
    number = max((_number(name) for name in _claimed(store)), default=0) + 1
    while True:
        version = f"v{number:04d}"
        key = f"{LABELS}{version}/claim.json"
        try:
            store.create(key, json.dumps({"attempt": attempt}).encode())
            return version
        except AlreadyExists:
            if json.loads(store.get(key)).get("attempt") == attempt:
                return version  # the reply to our own put was lost
            number += 1


def finish_version(store: SupportsVersions, lineage: LabelVersion) -> None:
    """Make the version exist, then point ``latest`` to it unless that is newer already."""
    key = f"{lineage.prefix}lineage.json"
    try:
        store.create(key, lineage.to_json())
    except AlreadyExists:
        if LabelVersion.from_json(store.get(key)).attempt != lineage.attempt:
            raise
    _point_latest(store, lineage.version)


def new_attempt() -> str:
    """An id for one writer."""
    return secrets.token_hex(8)


def versions(store: SupportsReadVersions) -> list[str]:
    """Versions that exist, oldest first."""
    suffix = "/lineage.json"
    found = [o.key for o in store.list(f"{LABELS}v") if o.key.endswith(suffix)]
    names = [key.removeprefix(LABELS).removesuffix(suffix) for key in found]
    return sorted((n for n in names if re.fullmatch(r"v\d+", n)), key=_number)


def read_version(store: SupportsReadVersions, version: str | None = None) -> LabelVersion:
    """A version's lineage; None or ``latest``: the newest.

    Raises:
        ConfigError: no such version; those there are named.
    """
    wanted = version if version not in (None, "latest") else _latest(store)
    if wanted is not None and re.fullmatch(r"v\d+", wanted):
        try:
            return LabelVersion.from_json(store.get(f"{LABELS}{wanted}/lineage.json"))
        except ObjectNotFound:
            pass
    there = versions(store)
    raise ConfigError(
        f"no label version {wanted!r}" if wanted else "the run has no label version yet",
        hint=f"there are {', '.join(there)}" if there else "`labelfleet decide RUN` makes one",
    )


def read_label_tables(
    store: SupportsGet, lineage: LabelVersion, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """A version's rows as Arrow tables, a row group at a time, in listing order."""
    for part in lineage.parts:
        file = pq.ParquetFile(pa.BufferReader(store.get(part.key)))
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns) if columns else None)


def part_metadata(lineage_so_far: dict[str, Any]) -> dict[bytes, bytes]:
    """File metadata of a part: the version, the classes and what boxes mean."""
    header = {"schema_version": VERSION, "box": "xyxy, pixels of the upright image"}
    return {METADATA_KEY: json.dumps({**header, **lineage_so_far}).encode()}


def _claimed(store: SupportsList) -> set[str]:
    names = (o.key.removeprefix(LABELS).split("/", 1)[0] for o in store.list(f"{LABELS}v"))
    return {name for name in names if re.fullmatch(r"v\d+", name)}


def _number(version: str) -> int:
    return int(version.removeprefix("v"))


def _latest(store: SupportsReadVersions) -> str | None:
    try:
        return str(json.loads(store.get(LATEST))["version"])
    except ObjectNotFound:
        # A writer that died between its lineage and the pointer leaves this to the listing.
        return next(reversed(versions(store)), None)


def _point_latest(store: SupportsVersions, version: str) -> None:
    body = json.dumps({"version": version}).encode()
    while True:
        try:
            etag = store.head(LATEST).etag
        except ObjectNotFound:
            try:
                store.create(LATEST, body)
                return
            except AlreadyExists:
                continue
        try:
            there = json.loads(store.get(LATEST, if_match=etag))["version"]
            if _number(there) >= _number(version):
                return
            store.replace(LATEST, body, if_match=etag)
            return
        except (ObjectChanged, ObjectNotFound):
            continue  # somebody moved it between our look and our put

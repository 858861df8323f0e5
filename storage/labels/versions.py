"""Label versions: merged label sets below ``labels/<version>/``, immutable once they exist.

    labels/v0001/claim.json            who writes this version; taken by one conditional put
    labels/v0001/part-000000.parquet   rows, one per image, in listing order
    labels/v0001/policy.yaml           the policy that judged the model's boxes
    labels/v0001/answered.jsonl        what the answers say about the model's labels, per image
    labels/v0001/alternatives.jsonl    boxes dropped for a likelier box of the same object
    labels/v0001/lineage.json          written last: the version exists when this does
    labels/latest.json                 pointer to the newest version, moved by conditional replace

A label is a box accepted by the policy or by a person; an ``ignore`` box counts as neither object
nor background. Boxes are xyxy in pixels of the upright image.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
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
from storage.objects.json_records import json_record, parse_record, read_record
from storage.objects.protocols import (
    AtRest,
    SupportsCreate,
    SupportsGet,
    SupportsHead,
    SupportsList,
    SupportsReplace,
)
from storage.parquet.files import metadata_of, opened
from storage.records import Category

LABELS = "labels/"
LATEST = "labels/latest.json"
VERSION = 1
_ANOTHER = "`labelfleet decide` makes a new version; restore this one from a backup"

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
        pa.field("annotator", pa.string()),  # null: no annotator
        pa.field("labelled_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class PartFile:
    """One Parquet object of a version; ``sha256`` is of its bytes, '' in older versions."""

    key: str
    rows: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class LabelVersion:
    """The contents of lineage.json: where a version comes from and what it contains.

    Attributes:
        version: ``v0001``, increasing; numbers are skipped where a writer died.
        attempt: id of the writer; distinguishes a lost reply from a rival.
        created_at: ISO 8601, UTC.
        run: its output URL's name and model: name, model_sha256, config_hash, licence.
        categories: classes with their official ids.
        policy: digest of policy.yaml.
        settling: how several answers to one image were settled, ``latest`` or ``agreement``.
        answers: answer parts that were read, by run URL.
        counts: images by source, labels, ignored and rejected boxes, images left out by status,
            answers by outcome. Of the rejected boxes, ``rejected_outside`` have no
            area in their image and ``rejected_alternative`` yielded to a box of the same object.
        parts: its Parquet objects in order.
        files: sha256 of its other objects by name; empty in versions of an older labelfleet.
        guarantee: the statement proven about the accepted boxes, or why it is void; '' if none.
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
    files: dict[str, str] = field(default_factory=dict)
    guarantee: str = ""

    @property
    def prefix(self) -> str:
        """Key prefix of its objects."""
        return f"{LABELS}{self.version}/"

    def to_json(self) -> bytes:
        """lineage.json."""
        return json_record({"schema_version": VERSION, **asdict(self)})

    @staticmethod
    def from_fields(fields: dict[str, Any]) -> LabelVersion:
        """Create from the fields of lineage.json. Raises ValueError: written by a newer
        labelfleet."""
        if fields.pop("schema_version") > VERSION:
            raise ValueError("written by a newer labelfleet")
        categories = tuple(Category(**c) for c in fields.pop("categories"))
        parts = tuple(PartFile(**p) for p in fields.pop("parts"))
        return LabelVersion(categories=categories, parts=parts, **fields)


class SupportsVersions(
    SupportsList, SupportsGet, SupportsHead, SupportsCreate, SupportsReplace, Protocol
):
    """What writing versions needs of a store."""


class SupportsReadVersions(SupportsList, SupportsGet, Protocol):
    """What reading versions needs of a store."""


def claim_version(store: SupportsVersions, attempt: str) -> str:
    """Claim the next free version number for good, even if this process dies."""
    number = max((_number(name) for name in claimed_versions(store)), default=0) + 1
    while True:
        version = f"v{number:04d}"
        key = f"{LABELS}{version}/claim.json"
        try:
            store.create(key, json_record({"version": version, "attempt": attempt}))
            return version
        except AlreadyExists:
            if read_record(store, key).get("attempt") == attempt:
                return version  # the reply to our own put was lost
            number += 1


def finish_version(store: SupportsVersions, lineage: LabelVersion) -> None:
    """Publish the version, then point ``latest`` to it unless that is already newer."""
    key = f"{lineage.prefix}lineage.json"
    try:
        store.create(key, lineage.to_json())
    except AlreadyExists:
        if read_record(store, key, LabelVersion.from_fields).attempt != lineage.attempt:
            raise
    _point_latest(store, lineage.version)


def new_attempt() -> str:
    """Return a new id for one writer."""
    return secrets.token_hex(8)


def versions(store: SupportsReadVersions) -> list[str]:
    """Return the published versions, oldest first."""
    suffix = "/lineage.json"
    found = [o.key for o in store.list(f"{LABELS}v") if o.key.endswith(suffix)]
    names = [key.removeprefix(LABELS).removesuffix(suffix) for key in found]
    return sorted((n for n in names if re.fullmatch(r"v\d+", n)), key=_number)


def read_version(store: SupportsReadVersions, version: str | None = None) -> LabelVersion:
    """Return a version's lineage; None or ``latest`` means the newest.

    Raises:
        ConfigError: no such version; the message names those that exist.
    """
    wanted = version if version not in (None, "latest") else _latest(store)
    if wanted is not None and re.fullmatch(r"v\d+", wanted):
        try:
            return read_lineage(store, wanted)
        except ObjectNotFound:
            pass
    there = versions(store)
    raise ConfigError(
        f"no label version {wanted!r}" if wanted else "the run has no label version yet",
        hint=f"there are {', '.join(there)}" if there else "`labelfleet decide RUN` makes one",
    )


def read_lineage(store: SupportsGet, version: str) -> LabelVersion:
    """Read the lineage.json of a version.

    Raises:
        ObjectNotFound: the version does not exist.
        StorageError: it is damaged, or belongs to another version.
    """
    key = f"{LABELS}{version}/lineage.json"
    lineage = read_record(store, key, LabelVersion.from_fields)
    if lineage.version != version:
        raise StorageError(f"{key} is that of version {lineage.version}", hint=_ANOTHER)
    return lineage


def read_label_tables(
    store: SupportsGet,
    lineage: LabelVersion,
    columns: Sequence[str] | None = None,
    *,
    only: str | None = None,
    at_once: int = 1,
) -> Iterator[pa.Table]:
    """Yield a version's rows as Arrow tables, a row group at a time, in listing order.

    Args:
        columns: names from the label schema, or None for all.
        only: key of the one part to read, or None for all.
        at_once: rows of a part up to which row groups are read together.

    Raises:
        ObjectNotFound: a part is missing.
        StorageError: a part is damaged, or is not the one named in the lineage.
    """
    for part in lineage.parts:
        if only is not None and part.key != only:
            continue
        raw = store.get(part.key)
        if part.sha256 and hashlib.sha256(raw).hexdigest() != part.sha256:
            raise StorageError(
                f"{part.key} is not what {lineage.prefix}lineage.json says: its checksum differs",
                hint=_ANOTHER,
            )
        with opened(raw, part.key, hint=_ANOTHER) as file:
            metadata_of(file, part.key)
            for groups in _together(file.metadata, at_once):
                yield file.read_row_groups(groups, columns=list(columns) if columns else None)


def _together(metadata: pq.FileMetaData, at_once: int) -> Iterator[list[int]]:
    """Yield the row groups, as many at a time as hold ``at_once`` rows, but one at least."""
    groups: list[int] = []
    rows = 0
    for number in range(metadata.num_row_groups):
        more = metadata.row_group(number).num_rows
        if groups and rows + more > at_once:
            yield groups
            groups, rows = [], 0
        groups.append(number)
        rows += more
    if groups:
        yield groups


def write_version_files(
    store: SupportsCreate, version: str, files: Mapping[str, AtRest]
) -> dict[str, str]:
    """Create objects of a version beside its parts; return their sha256 by name."""
    for name, body in files.items():
        store.create(f"{LABELS}{version}/{name}", body)
    return {name: sha256_of(body) for name, body in files.items()}


def sha256_of(body: AtRest) -> str:
    """Return the sha256 of bytes or of a local file, in hex."""
    if isinstance(body, bytes):
        return hashlib.sha256(body).hexdigest()
    with body.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_version_file(store: SupportsGet, lineage: LabelVersion, name: str) -> bytes:
    """Read an object of a version beside its parts: policy.yaml, answered.jsonl.

    Raises:
        ObjectNotFound: it is missing.
        StorageError: it is not the one named in the lineage.
    """
    key = f"{lineage.prefix}{name}"
    raw = store.get(key)
    wanted = lineage.files.get(name)
    if wanted is not None and hashlib.sha256(raw).hexdigest() != wanted:
        raise StorageError(
            f"{key} is not what {lineage.prefix}lineage.json says: its checksum differs",
            hint=_ANOTHER,
        )
    return raw


def part_metadata(lineage_so_far: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON for a part's footer: version, classes and box convention."""
    header = {"schema_version": VERSION, "box": "xyxy, pixels of the upright image"}
    return {**header, **lineage_so_far}


def claimed_versions(store: SupportsList) -> set[str]:
    """Return the versions that were started, finished or not."""
    names = (o.key.removeprefix(LABELS).split("/", 1)[0] for o in store.list(f"{LABELS}v"))
    return {name for name in names if re.fullmatch(r"v\d+", name)}


def _version_in(fields: dict[str, Any]) -> str:
    version = fields["version"]
    if not re.fullmatch(r"v\d+", version):
        raise ValueError(f"no version {version!r:.40}")
    return str(version)


def _number(version: str) -> int:
    return int(version.removeprefix("v"))


def _latest(store: SupportsReadVersions) -> str | None:
    try:
        return read_record(store, LATEST, _version_in)
    except ObjectNotFound:
        # If a writer died between lineage and pointer, the listing decides.
        return next(reversed(versions(store)), None)


def _point_latest(store: SupportsVersions, version: str) -> None:
    body = json_record({"version": version})
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
            there = parse_record(store.get(LATEST, if_match=etag), LATEST, _version_in)
            if _number(there) >= _number(version):
                return
            store.replace(LATEST, body, if_match=etag)
            return
        except (ObjectChanged, ObjectNotFound):
            continue  # another writer moved it between our read and our put

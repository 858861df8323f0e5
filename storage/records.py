"""The core types: frozen and slotted; their methods only derive values from their fields."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Status = Literal["ok", "undecodable", "too_large", "unsupported", "missing", "not_finite"]
STATUSES: tuple[Status, ...] = (
    "ok", "undecodable", "too_large", "unsupported", "missing", "not_finite",
)  # fmt: skip

ShardKind = Literal["tar", "images"]
SHARD_KINDS: tuple[ShardKind, ...] = ("tar", "images")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object as a listing shows it.

    Attributes:
        key: path below the store's root, '/'-separated, no leading slash.
        nbytes: size in bytes.
        etag: opaque version; for files size and mtime_ns, for S3 the ETag without quotes.
        modified_at: seconds since the epoch on the store's clock; None where unknown, as in a
            run's frozen listings. Not part of the object's identity.
    """

    key: str
    nbytes: int
    etag: str
    modified_at: float | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work, of retry and of commit: one tar object, or a group of loose images.

    Attributes:
        shard_id: 16 hex digits, from content identity; see ``shard_id_of``.
        kind: ``tar`` (exactly one object) or ``images`` (each object is one image).
        objects: its objects, ordered by key.
    """

    shard_id: str
    kind: ShardKind
    objects: tuple[StoredObject, ...]

    @property
    def nbytes(self) -> int:
        """Total listed size in bytes."""
        return sum(o.nbytes for o in self.objects)

    @property
    def key(self) -> str:
        """Display name: the tar's key, or the first image's key and the number of others."""
        first = self.objects[0].key
        rest = len(self.objects) - 1
        return first if rest == 0 else f"{first} (+{rest})"


def shard_id_of(objects: Iterable[StoredObject]) -> str:
    """Return 16 hex digits of sha256 over the sorted (key, size, etag) of the shard's objects."""
    pieces: list[bytes] = []
    for key, nbytes, etag in sorted((o.key, o.nbytes, o.etag) for o in objects):
        # Length-prefixed, so that no key can imitate a neighbouring field.
        for part in (key, str(nbytes), etag):
            raw = part.encode("utf-8", "surrogateescape")
            pieces += (len(raw).to_bytes(8, "big"), raw)
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image as it comes out of a shard, before decoding.

    Attributes:
        image_id: ``<object key>`` or ``<shard key>/<member>``; unique in the run: a repeated
            member name and a further frame become ``name#2``, and see ``image_id_of``.
        offset: where its bytes begin in the object; None inside a compressed tar.
        nbytes: their number (as announced, when they could not be read).
        data: the bytes, of a further frame as ``shards.frames`` has them; None when the record
            already failed (see ``status``).
        status: ``ok`` as long as nothing has failed; else the row's final status.
        error: why, when status is not ``ok``.
    """

    image_id: str
    offset: int | None
    nbytes: int
    data: bytes | None
    status: Status = "ok"
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections of one image, as arrays over N boxes, highest score first.

    Attributes:
        boxes: float32 [N, 4], xyxy in pixels; of the letterboxed input when it leaves the
            detector, of the upright image once inverted and in every row.
        scores: float32 [N], in [0, 1]; IoU-aware, not a probability of being right.
        category_ids: int16 [N], contiguous class index.
        topk_ids: int16 [N, K], the K = min(5, classes) best classes of the box's anchor.
        topk_scores: float32 [N, K], descending.
        box_std: float32 [N, 4], standard deviation of the DFL distribution per side
            (left, top, right, bottom), in the pixels that ``boxes`` are in.
        box_entropy: float32 [N], entropy of the DFL distribution in nats, mean over the sides.
        anchor: int32 [N], index of the anchor point the box came from. This and the two before it
            are None from detectors of other families than YOLO-NAS.
        run_scores: float32 [N, R], in a fused run the score that each of the R runs gave the box;
            NaN where a run did not vote for it. None in any other run.
        agreement: float32 [N], in a fused run how much the runs agree on the box, in [0, 1]; NaN
            where only one run could see it. None in any other run.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int16]
    topk_ids: NDArray[np.int16]
    topk_scores: NDArray[np.float32]
    box_std: NDArray[np.float32] | None
    box_entropy: NDArray[np.float32] | None
    anchor: NDArray[np.int32] | None
    run_scores: NDArray[np.float32] | None = None
    agreement: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @staticmethod
    def empty(topk: int = 1) -> Detections:
        """Return detections without any box."""
        return Detections(
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            category_ids=np.zeros(0, np.int16),
            topk_ids=np.zeros((0, topk), np.int16),
            topk_scores=np.zeros((0, topk), np.float32),
            box_std=np.zeros((0, 4), np.float32),
            box_entropy=np.zeros(0, np.float32),
            anchor=np.zeros(0, np.int32),
        )


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Which image, and where its bytes lie: the part that every record of an image begins with.

    Attributes:
        image_id: as in ``ImageRecord``.
        shard_id: the shard that holds the image.
        offset: where its bytes begin in the shard's object; None inside a compressed tar.
        nbytes: their count.
        sha256: of the bytes, in hex, of a further frame with its number behind them
            (``shards.frames``); '' where they could not be read.
    """

    image_id: str
    shard_id: str
    offset: int | None
    nbytes: int
    sha256: str

    @property
    def fields(self) -> tuple[str, str, int | None, int, str]:
        """The values of these five fields, in order."""
        return self.image_id, self.shard_id, self.offset, self.nbytes, self.sha256


@dataclass(frozen=True, slots=True)
class AnnotationRow(ImageRef):
    """One image's row: what the annotation Parquet holds, see storage/runs/annotations.py.

    Width, height and orientation are 0 where the image could not be opened; ``phash`` is None
    where it could not be decoded.

    Attributes:
        frames: pages or animation frames in the file; None where they were not counted: the image
            could not be opened, or the row was written under schema version 1.
        warning: what was odd about an image that was labelled nevertheless, as ``kind: detail``
            joined by "; " (see ``warning_kinds``); None: nothing.
    """

    phash: int | None
    width: int
    height: int
    exif_orientation: int
    status: Status
    error: str | None
    detections: Detections
    frames: int | None = None
    warning: str | None = None


def warning_kinds(warning: str | None) -> list[str]:
    """Return the kinds of a row's warnings, such as ``trailing bytes``, without their details."""
    return [part.split(":", 1)[0] for part in warning.split("; ")] if warning else []


_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2})")
_NUMBERED = re.compile(r"#[0-9]+$")
_IN_A_TAR = re.compile(r"\.(tar|tar\.gz|tgz)/", re.IGNORECASE)


def printable(name: str | bytes) -> str:
    """Return a name as it stands in ``image_id``: valid UTF-8, and different for different names.

    Bytes that are not UTF-8 become ``\\xNN``; a backslash that looks like the start of such an
    escape becomes ``\\x5c``.
    """
    if isinstance(name, bytes):
        if name.isascii() and b"\\" not in name:  # nearly all names
            return name.decode("ascii")
    elif name.isascii() and "\\" not in name:
        return name
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    return (
        _ESCAPE.sub(r"\\x5c", raw.decode("utf-8", "surrogateescape"))
        .encode("utf-8", "surrogateescape")
        .decode("utf-8", "backslashreplace")
    )


def image_id_of(key: str) -> str:
    """Return the id of a loose image, which no member of a tar has.

    A folder named like a tar may exist beside that tar; see ``tar_folders``. A name that itself
    ends in ``#`` and digits gets ``#1`` behind it, since ``name#2`` is a frame of ``name``.
    """
    return printable(key) + tar_folders(key) + "#1" * bool(_NUMBERED.search(key))


def tar_folders(key: str) -> str:
    """Return the id suffix that marks where the object's key ends: ``#1`` for each parent folder
    named like a tar; '' for ordinary keys. The name of a member ends in an image's suffix, or in
    ``#2`` or more."""
    return "#1" * len(_IN_A_TAR.findall(key))


def image_ids_of(key: str) -> tuple[str, ...]:
    """Return the id of a loose image, and those that older runs may have used, if different."""
    raw = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return tuple(dict.fromkeys((image_id_of(key), printable(key) + tar_folders(key), raw)))


LINK_ETAG = "link"  # a symbolic link to a file: listed, never followed
FOLDER_LINK_ETAG = "folder link"  # a symbolic link to a folder: likewise


SPECIAL_ETAG = "special"  # a pipe, a socket or a device


@dataclass(frozen=True, slots=True)
class Category:
    """A class: ``id`` contiguous, as in the rows; ``official_id`` the data set's own."""

    id: int
    name: str
    official_id: int


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The run's identity, stored in each of its annotation objects."""

    name: str
    config_hash: str
    model_sha256: str
    licence: str
    runtime: str
    precision: str
    code_version: str
    categories: tuple[Category, ...]


Xyxy = tuple[float, float, float, float]

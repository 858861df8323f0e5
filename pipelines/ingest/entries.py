"""Entries: the items of every ingest source, and the names of their tar members.

Names inside a source are labels. They are written into tars that others may extract, so parts
that would lead out of a folder are left out of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from storage.errors import TooLarge, Undecodable
from storage.shards.selecting import LeftOut, classify
from workers.images.signatures import format_of

_SUFFIX_OF = {
    "JPEG": ".jpg", "PNG": ".png", "WebP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif",
    "AVIF": ".avif", "JPEG 2000": ".jp2", "PNM": ".pnm", "Photoshop": ".psd", "TGA": ".tga",
    "HEIF": ".heic", "JPEG XL": ".jxl", "DICOM": ".dcm", "camera RAW": ".dng",
}  # fmt: skip


class Unreachable(Undecodable):
    """An entry whose server did not answer, or was overloaded: not the image's fault."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source, not read yet.

    Attributes:
        name: what the tar member is called, less a suffix where the bytes' format gives it.
        where: for messages, without secrets.
        nbytes: as listed; a guess where only reading tells.
        version: changes when the listed entry does; part of the source's fingerprint.
        read: the bytes. Raises ImageError for this entry alone, StorageError when the source
            as a whole fails.
    """

    name: str
    where: str
    nbytes: int
    version: str
    read: Callable[[], bytes]


class Source(Protocol):
    """A sequence of entries that is the same on every pass while nothing changes."""

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        ...

    left_out: LeftOut  # what the last full pass over the entries skipped

    @property
    def readers(self) -> int:
        """How many entries may be read at once."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Yield all images in a fixed order; files not named like images are skipped."""
        ...

    def remarks(self) -> list[str]:
        """Remarks for people on how the source was read."""
        ...


@dataclass(frozen=True, slots=True)
class SourceSurvey:
    """Result of one pass over a source's entries.

    Attributes:
        entries, nbytes: how many, and their listed size together.
        fingerprint: 16 hex digits over names, sizes and versions, in order.
    """

    entries: int
    nbytes: int
    fingerprint: str


def survey(source: Source) -> SourceSurvey:
    """Pass over the entries without reading them."""
    count = nbytes = 0
    digest = hashlib.sha256()
    for entry in source.entries():
        line = f"{entry.name}\0{entry.where}\0{entry.nbytes}\0{entry.version}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        count += 1
        nbytes += entry.nbytes
    return SourceSurvey(count, nbytes, digest.hexdigest()[:16])


def check_size(nbytes: int, limit: int) -> None:
    """Raises TooLarge."""
    if nbytes > limit:
        raise TooLarge(f"{nbytes} bytes or more; the limit is {limit}")


def member_name(name: str) -> str:
    """Return the name without what would lead out of a folder: leading '/', '.', '..' and NULs."""
    parts = name.replace("\0", "").split("/")
    kept = "/".join(part for part in parts if part not in ("", ".", ".."))
    return kept or "unnamed"


def with_image_suffix(name: str, body: bytes) -> str:
    """Return the name for a shard's readers: with a suffix by content if it has none.

    Raises:
        Undecodable: no suffix, and the bytes are not an image of a known format.
    """
    if classify(name) == "image":
        return name
    kind = format_of(body)
    if kind is None:
        raise Undecodable("neither its name nor its bytes are those of an image")
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.removeprefix('._') or 'image'}{_SUFFIX_OF[kind]}"

"""Directories of a TIFF, read here; EXIF is made of the same."""

from __future__ import annotations

import hashlib
import struct
import threading
from array import array
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.images.pixels import valid_orientation
from workers.images.tiff import tags

_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8",
          17: "i8", 18: "u8"}  # fmt: skip
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
_WANTED = frozenset(
    {tags.SUBFILE, tags.WIDTH, tags.HEIGHT, tags.BITS, tags.COMPRESSION, tags.PHOTOMETRIC,
     tags.FILL_ORDER, tags.STRIP_OFFSETS, tags.ORIENTATION, tags.SAMPLES, tags.ROWS_PER_STRIP,
     tags.STRIP_NBYTES, tags.PLANAR, tags.T4_OPTIONS, tags.T6_OPTIONS, tags.PREDICTOR,
     tags.TILE_WIDTH, tags.TILE_HEIGHT, tags.TILE_OFFSETS, tags.TILE_NBYTES, tags.SUBIFDS,
     tags.EXTRA, tags.SAMPLE_FORMAT, tags.ICC, tags.DNG}
)  # fmt: skip
_MAX_PAGES, _MAX_SUBIFDS = 65_535, 64
_MAX_ENTRIES = 4096  # of one directory, as in libtiff
_MAX_SAMPLES, _MAX_TOLD = 65_535, 64
_SENSOR = (32803, 34892)  # colour filter array, linear raw: what a camera's sensor saw


@dataclass(frozen=True, slots=True)
class TiffPage:
    """One image file directory: where the values of its integer tags lie in the file.

    Values are views of the file, made on demand: entries of many directories may point at the same
    bytes, and a copy for each would multiply them.
    """

    data: bytes
    order: str
    entries: dict[int, tuple[int, int, int]]  # by tag: type, count, offset

    def has(self, tag: int) -> bool:
        """Return whether there is a value of this tag."""
        return tag in self.entries

    def count(self, tag: int) -> int:
        """Return how many values a tag has."""
        return self.entries[tag][1] if tag in self.entries else 0

    def values(self, tag: int) -> NDArray[Any]:
        """Return the values of a tag; empty where there are none."""
        if tag not in self.entries:
            return np.empty(0, np.uint8)
        kind, count, offset = self.entries[tag]
        return np.frombuffer(self.data, f"{self.order}{_TYPES[kind]}", count, offset)

    def first(self, tag: int, otherwise: int) -> int:
        """Return the first value of a tag, ``otherwise`` where there is none."""
        return int(self.values(tag)[0]) if tag in self.entries else otherwise

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels as stored."""
        return self.first(tags.WIDTH, 0), self.first(tags.HEIGHT, 0)

    @property
    def bits(self) -> frozenset[int]:
        """The different numbers of bits a sample."""
        return frozenset(np.unique(self.values(tags.BITS)[:_MAX_SAMPLES]).tolist()) or frozenset(
            {1}
        )

    @property
    def orientation(self) -> int:
        """1-8; the tag may be of any integer type."""
        return valid_orientation(self.first(tags.ORIENTATION, 1))

    @property
    def reduced(self) -> bool:
        """Return whether it is a smaller copy of another page."""
        return bool(self.first(tags.SUBFILE, 0) & 1)

    def describe(self) -> str:
        """Return bits, samples, colour model and compression in words."""
        stored = self.values(tags.BITS)[:_MAX_TOLD].tolist() or [1]
        bits = "/".join(str(b) for b in dict.fromkeys(stored))
        kind = {2: " signed", 3: " float"}.get(self.first(tags.SAMPLE_FORMAT, 1), "")
        colour, compression = self.first(tags.PHOTOMETRIC, -1), self.first(tags.COMPRESSION, 1)
        return (
            f"TIFF of {self.first(tags.SAMPLES, 1)} samples of {bits}{kind} bits, "
            f"{tags.PHOTOMETRICS.get(colour, f'photometric {colour}')}, "
            f"compression {tags.COMPRESSIONS.get(compression, compression)}"
        )


@dataclass(frozen=True, slots=True)
class TiffPages:
    """The main chain of directories; its length costs no memory.

    Attributes:
        leading: the first directories; the first alone where a further page is wanted.
        index, main, at: the page that is wanted: the first that is not a smaller copy of another,
            else the first of all; its place in the chain, its directory and that one's offset.
        frames: pages that are not smaller copies of others.
    """

    leading: tuple[TiffPage, ...]
    index: int
    main: TiffPage
    at: int
    frames: int


class DirectoryReader:
    """Directories of a classic TIFF or a BigTIFF, in either byte order.

    Directories that do not overlap have as many entries as the file has room for. A reader reads
    no more, however often a chain leads over the same bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._order = "<" if data[:2] == b"II" else ">"
        self._big = data[2:4] in (b"+\0", b"\0+")
        self._entries_left = len(data) // (20 if self._big else 12)

    def first(self) -> int:
        return int(self._int("Q", 8) if self._big else self._int("I", 4))

    def _int(self, code: str, at: int) -> int:
        return int(struct.unpack_from(self._order + code, self._data, at)[0])

    def link(self, at: int) -> tuple[int, str]:
        """(where a directory says which is the next, as an integer of which struct code)."""
        if self._big:
            return at + 8 + 20 * self._int("Q", at), "Q"
        return at + 2 + 12 * self._int("H", at), "I"

    def page(self, at: int) -> tuple[TiffPage, int]:
        """(the directory at this offset, the offset of the next; 0: it is the last)."""
        count_code, entry, inline = ("Q", 20, 8) if self._big else ("H", 12, 4)
        start = at + struct.calcsize(f"={count_code}")
        found: dict[int, tuple[int, int, int]] = {}
        stored = self._int(count_code, at)
        end, wide = self.link(at)
        room = max(0, len(self._data) - start) // entry
        read = min(stored, room, _MAX_ENTRIES, self._entries_left)
        self._entries_left -= read
        for here in range(start, start + read * entry, entry):
            tag, kind = self._int("H", here), self._int("H", here + 2)
            # As in libtiff, the first of several entries of one tag counts.
            if tag not in _WANTED or kind not in _TYPES or tag in found:
                continue
            count, value = self._int(wide, here + 4), here + 4 + inline
            if count * _SIZES[kind] > inline:
                value = self._int(wide, value)
            count = min(count, (len(self._data) - value) // _SIZES[kind])
            if count > 0:
                found[tag] = (kind, count, value)
        last = self._entries_left <= 0 or end + struct.calcsize(f"={wide}") > len(self._data)
        following = 0 if last else self._int(wide, end)
        return TiffPage(self._data, self._order, found), following


@dataclass(frozen=True, slots=True)
class _Chain:
    """Where the directories of a main chain lie, as offsets in the file: 16 bytes a page.

    Attributes:
        leading: the first directories.
        frames: those that are not smaller copies of others.
        places: the place of each of these in the chain.
    """

    leading: list[int]
    frames: array[int]
    places: array[int]


def _walk(reader: DirectoryReader) -> _Chain:
    """Follow the main chain to its end, or to where it is damaged."""
    chain = _Chain([], array("Q"), array("Q"))
    seen: set[int] = set()
    try:
        at = reader.first()
        while at and at not in seen and len(seen) < _MAX_PAGES:
            page, following = reader.page(at)
            if len(chain.leading) < _MAX_SUBIFDS:
                chain.leading.append(at)
            if not page.reduced:
                chain.frames.append(at)
                chain.places.append(len(seen))
            seen.add(at)
            at = following
    except struct.error:  # it points outside of the file
        pass
    return chain


_last_here = threading.local()  # the chain of the file whose further pages a thread reads


def _known_chain(data: bytes) -> _Chain:
    """Return the file's chain, walked once a thread: not again for each of its pages."""
    digest = hashlib.sha256(data).digest()
    kept: tuple[bytes, _Chain] | None = getattr(_last_here, "chain", None)
    if kept is None or kept[0] != digest:
        kept = digest, _walk(DirectoryReader(data))
        _last_here.chain = kept
    return kept[1]


def read_pages(data: bytes, frame: int = 1) -> TiffPages | None:
    """Return the directories of the main chain; None where not even the first can be read.

    Args:
        frame: which of the pages that are not smaller copies is wanted.
    """
    chain = _walk(DirectoryReader(data)) if frame == 1 else _known_chain(data)
    if not chain.leading:
        return None
    reader = DirectoryReader(data)
    # Of a file that is read page by page, the same directories are not read for each of them.
    leading = tuple(reader.page(at)[0] for at in chain.leading[: None if frame == 1 else 1])
    frames = len(chain.frames)
    if not 1 <= frame <= frames:
        return TiffPages(leading, 0, leading[0], chain.leading[0], max(1, frames))
    at, index = chain.frames[frame - 1], chain.places[frame - 1]
    return TiffPages(leading, index, DirectoryReader(data).page(at)[0], at, frames)


def alone(data: bytes, pages: TiffPages) -> tuple[bytes, TiffPages]:
    """Return the TIFF with the wanted page as its only one.

    Decoders look at every page before the one that they are asked for, and at those behind it.
    """
    link, wide = DirectoryReader(data).link(pages.at)
    head = 16 if wide == "Q" else 8
    size = struct.calcsize(f"={wide}")
    if link < head:  # a directory inside of the header
        return data, pages
    offset = struct.pack(pages.main.order + wide, pages.at)
    parts = (data[: head - size], offset, data[head:link], bytes(size), data[link + size :])
    single = b"".join(parts)
    main = replace(pages.main, data=single)
    return single, TiffPages((main,), 0, main, pages.at, pages.frames)


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation that EXIF states, 1-8; None where it states none.

    One damaged entry costs that entry, not those behind it. Further directories are a thumbnail's.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return None
    reader = DirectoryReader(exif)
    try:
        page, _ = reader.page(reader.first())
    except struct.error:
        return None
    said = page.first(tags.ORIENTATION, 0)
    return said if 1 <= said <= 8 else None


def is_camera_raw(data: bytes, pages: TiffPages | None) -> bool:
    """Return whether what the sensor saw is in it, beside or behind a thumbnail."""
    if pages is None:
        return False
    reader = DirectoryReader(data)
    candidates = list(pages.leading)
    for at in pages.leading[0].values(tags.SUBIFDS)[:_MAX_SUBIFDS].tolist():
        try:
            candidates.append(reader.page(at)[0])
        except struct.error:
            continue
    return any(p.has(tags.DNG) or p.first(tags.PHOTOMETRIC, -1) in _SENSOR for p in candidates)

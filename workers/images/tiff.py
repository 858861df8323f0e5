"""TIFF: directories are read here, pixels by libvips.

Pillow reads planar samples, 16 bits, palettes, inverted grey and subsampled YCbCr wrongly or not at
all. It is asked only where libvips stumbles over tags that the pixels do not depend on, or lacks a
codec. EXIF is made of the same directories.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from storage.errors import TooLarge, Undecodable, Unsupported
from workers.images.pixels import (
    DecodedImage,
    as_rgb,
    check_pixels,
    check_room,
    first_bands,
    let_go,
    libvips,
    on_disk,
    profile_warning,
    silence_pillow,
    to_8_bits,
    upright,
    valid_orientation,
    vips_samples,
    whole_image,
)
from workers.images.preprocessing import ValueRange

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_ORIENTATION, _SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 274, 277, 284, 322, 323
_SUBIFDS, _EXTRA, _SAMPLE_FORMAT, _ICC, _DNG = 330, 338, 339, 34675, 50706
_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8",
          17: "i8", 18: "u8"}  # fmt: skip
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
_FILL_ORDER, _STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_NBYTES = 266, 273, 278, 279
# From this size on a page is read in strips, and lies on disk: 192 MiB of RGB.
STRIPED_PIXELS, _STRIP_ROWS = 1 << 26, 128
_WANTED = frozenset(
    {_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR,
     _TILE_WIDTH, _TILE_HEIGHT, _SUBIFDS, _EXTRA, _SAMPLE_FORMAT, _ICC, _DNG,
     266, 273, 278, 279, 292, 293, 317, 324, 325}
)  # fmt: skip
# Where the pixels lie, one value for each piece of each plane; and how each piece is packed.
_ROWS_PER_STRIP = 278
_WHERE = (273, 279, 324, 325)
_LAYOUT = (_WIDTH, _HEIGHT, _COMPRESSION, 266, 278, 292, 293, 317, _TILE_WIDTH, _TILE_HEIGHT)
_MAX_PAGES, _MAX_SUBIFDS = 65_535, 64
_MAX_ENTRIES = 4096  # of one directory, as in libtiff
_MAX_SAMPLES, _MAX_TOLD, _MAX_PROFILE_NBYTES = 65_535, 64, 1 << 20
# What all samples of a page may take for each of max_pixels: as much as CMYK of 32 bits.
_MAX_PIXEL_NBYTES = 16
_SENSOR = (32803, 34892)  # colour filter array, linear raw: what a camera's sensor saw
_COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4", 5: "LZW", 6: "old JPEG",
    7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34887: "LERC", 34925: "LZMA",
    34712: "JPEG 2000", 34933: "PNG", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL",
    32809: "ThunderScan", 32766: "NeXT", 34676: "SGI log", 34677: "SGI log 24",
    33003: "Aperio JPEG 2000 YCbCr", 33005: "Aperio JPEG 2000 RGB", 34934: "JPEG XR",
}  # fmt: skip
_PHOTOMETRICS = {
    0: "inverted grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr",
    8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32844: "LogL", 32845: "LogLuv",
}  # fmt: skip
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 3, 5: 4, 6: 3}  # samples that are colour, by photometric
# In libvips' messages: it has no code for this kind; the pixels are not affected.
_VIPS_CANNOT = (
    "not configured", "not supported", "nsupported", "can not handle", "samples_per_pixel",
    "samples out of range", "not implemented",
)  # fmt: skip
_ABOUT_TAGS = ("custom tag", "bad seek", "IFD")
_PILLOWS = (6, 34925)  # old JPEG and LZMA are not in every libtiff; Pillow has its own
_READABLE = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000, 50001})


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
        return self.first(_WIDTH, 0), self.first(_HEIGHT, 0)

    @property
    def bits(self) -> frozenset[int]:
        """The different numbers of bits a sample."""
        return frozenset(np.unique(self.values(_BITS)[:_MAX_SAMPLES]).tolist()) or frozenset({1})

    @property
    def orientation(self) -> int:
        """1-8; the tag may be of any integer type."""
        return valid_orientation(self.first(_ORIENTATION, 1))

    @property
    def reduced(self) -> bool:
        """Return whether it is a smaller copy of another page."""
        return bool(self.first(_SUBFILE, 0) & 1)

    def describe(self) -> str:
        """Return bits, samples, colour model and compression in words."""
        stored = self.values(_BITS)[:_MAX_TOLD].tolist() or [1]
        bits = "/".join(str(b) for b in dict.fromkeys(stored))
        kind = {2: " signed", 3: " float"}.get(self.first(_SAMPLE_FORMAT, 1), "")
        colour, compression = self.first(_PHOTOMETRIC, -1), self.first(_COMPRESSION, 1)
        return (
            f"TIFF of {self.first(_SAMPLES, 1)} samples of {bits}{kind} bits, "
            f"{_PHOTOMETRICS.get(colour, f'photometric {colour}')}, "
            f"compression {_COMPRESSIONS.get(compression, compression)}"
        )


@dataclass(frozen=True, slots=True)
class TiffPages:
    """The main chain of directories; its length costs no memory.

    Attributes:
        leading: the first directories.
        index, main: the first page that is not a smaller copy of another, else the first of all.
        frames: pages that are not smaller copies of others.
    """

    leading: tuple[TiffPage, ...]
    index: int
    main: TiffPage
    frames: int


class _Reader:
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

    def page(self, at: int) -> tuple[TiffPage, int]:
        """(the directory at this offset, the offset of the next; 0: it is the last)."""
        count_code, entry, inline = ("Q", 20, 8) if self._big else ("H", 12, 4)
        wide = "Q" if self._big else "I"
        start = at + struct.calcsize(f"={count_code}")
        found: dict[int, tuple[int, int, int]] = {}
        stored = self._int(count_code, at)
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
        end = start + stored * entry
        last = self._entries_left <= 0 or end + struct.calcsize(f"={wide}") > len(self._data)
        following = 0 if last else self._int(wide, end)
        return TiffPage(self._data, self._order, found), following


def read_pages(data: bytes) -> TiffPages | None:
    """Return the directories of the main chain; None where not even the first can be read."""
    reader = _Reader(data)
    leading: list[TiffPage] = []
    seen: set[int] = set()
    main: tuple[int, TiffPage] | None = None
    frames = 0
    try:
        at = reader.first()
        while at and at not in seen and len(seen) < _MAX_PAGES:
            page, following = reader.page(at)
            if len(leading) < _MAX_SUBIFDS:
                leading.append(page)
            if not page.reduced:
                main = main or (len(seen), page)
                frames += 1
            seen.add(at)
            at = following
    except struct.error:  # it points outside of the file
        pass
    if not leading:
        return None
    index, page = main or (0, leading[0])
    return TiffPages(tuple(leading), index, page, max(1, frames))


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation that EXIF states, 1-8; None where it states none.

    One damaged entry costs that entry, not those behind it. Further directories are a thumbnail's.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return None
    reader = _Reader(exif)
    try:
        page, _ = reader.page(reader.first())
    except struct.error:
        return None
    said = page.first(_ORIENTATION, 0)
    return said if 1 <= said <= 8 else None


def is_camera_raw(data: bytes, pages: TiffPages | None) -> bool:
    """Return whether what the sensor saw is in it, beside or behind a thumbnail."""
    if pages is None:
        return False
    reader = _Reader(data)
    candidates = list(pages.leading)
    for at in pages.leading[0].values(_SUBIFDS)[:_MAX_SUBIFDS].tolist():
        try:
            candidates.append(reader.page(at)[0])
        except struct.error:
            continue
    return any(p.has(_DNG) or p.first(_PHOTOMETRIC, -1) in _SENSOR for p in candidates)


def decode_tiff(
    data: bytes, pages: TiffPages | None, max_pixels: int, value_range: ValueRange
) -> DecodedImage:
    """Decode the main page. Raises as ``decode``, or whatever Pillow and libvips raise."""
    if pages is None:
        raise Undecodable("damaged TIFF: no image directory")
    index, page = pages.index, pages.main
    check_pixels(*page.size, max_pixels)
    # A tile is decoded whole, however small the image that it is cut from.
    check_pixels(page.first(_TILE_WIDTH, 1), page.first(_TILE_HEIGHT, 1), max_pixels)
    _check_kind(page)
    _check_samples(page, max_pixels)
    profile = page.values(_ICC)[:_MAX_PROFILE_NBYTES].astype(np.uint8).tobytes()
    warnings = profile_warning(profile)
    extra, colours = page.count(_EXTRA), _COLOURS[page.first(_PHOTOMETRIC, 1)]
    if (bands := page.first(_SAMPLES, 1)) > colours + extra:
        warnings.append(f"ignored bands: its tags name {colours + extra} of {bands} samples")
    try:
        planes = page.first(_PLANAR, 1) == 2 and page.first(_SAMPLES, 1) > 1
        striped = None if planes else _by_strips(data, index, page)
        if striped is not None:
            pixels = striped
        else:
            stored = None if planes else _as_stored(data, page)
            if stored is None:
                stored = _by_planes(data, page) if planes else _by_vips(data, index, page)
            samples = stored
            pixels = upright(_eight_bits(samples, page, value_range, warnings), page.orientation)
    except _DamagedTags as exc:
        if index > 0 or page.bits - {1, 8}:
            raise Undecodable(f"damaged TIFF: {exc}") from exc
        warnings.append(f"corrupt data: {exc}")
        pixels = _by_pillow(data, max_pixels)
    except Unsupported:
        if index > 0 or not _is_plain(page) or page.first(_COMPRESSION, 1) not in _PILLOWS:
            raise
        pixels = _by_pillow(data, max_pixels)
    return whole_image(pixels, page.orientation, pages.frames, warnings)


class _DamagedTags(Exception):
    """libvips stumbled over tags or directories, which the pixels do not depend on."""


def _by_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Upright RGB."""
    silence_pillow()
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    check_pixels(*image.size, max_pixels)
    image.load()
    return np.ascontiguousarray(image if image.mode == "RGB" else image.convert("RGB"))


def _by_planes(data: bytes, page: TiffPage) -> NDArray[Any]:
    """Samples of colour planes that lie one after the other, each read as an image of its own.

    libvips does not read them in tiles, and mixes up two of them in strips.
    """
    photometric = page.first(_PHOTOMETRIC, 1)
    colours = _COLOURS[photometric]
    planes = [_by_vips(_plane(data, page, k), 0, page) for k in range(colours)]
    return np.dstack([plane[..., 0] for plane in planes])


def _plane(data: bytes, page: TiffPage, index: int) -> bytes:
    """Return the TIFF with an appended directory that describes a single plane, as grey."""
    samples = page.first(_SAMPLES, 1)
    tags = {tag: page.values(tag)[:1] for tag in _LAYOUT if page.has(tag)}
    for tag in _WHERE:
        if count := page.count(tag):
            share = count // samples
            tags[tag] = page.values(tag)[index * share : (index + 1) * share]
    inverted = page.first(_PHOTOMETRIC, 1) == 0
    single = {_BITS: page.first(_BITS, 1), _PHOTOMETRIC: int(not inverted), _SAMPLES: 1,
              _SAMPLE_FORMAT: page.first(_SAMPLE_FORMAT, 1)}  # fmt: skip
    tags |= {tag: np.array([value]) for tag, value in single.items()}
    order, big = ("<" if data[:2] == b"II" else ">"), data[2:4] in (b"+\0", b"\0+")
    wide, kind, entry = ("Q", 16, 20) if big else ("I", 4, 12)
    size = struct.calcsize(f"={wide}")
    at = len(data) + len(data) % 2
    values_at = at + (8 if big else 2) + entry * len(tags) + size
    directory = struct.pack(order + ("Q" if big else "H"), len(tags))
    behind = b""
    for tag, values in sorted(tags.items()):
        packed = values.astype(f"{order}u{size}").tobytes()
        directory += struct.pack(f"{order}HH{wide}", tag, kind, len(values))
        if len(values) == 1:
            directory += packed
        else:
            directory += struct.pack(order + wide, values_at + len(behind))
            behind += packed
    header = data[:8] if big else data[:4]
    whole = header + struct.pack(order + wide, at) + data[len(header) + size :]
    return whole.ljust(at, b"\0") + directory + bytes(size) + behind


def _is_plain(page: TiffPage) -> bool:
    """Return whether Pillow reads it right: 8 bits, interleaved, no further samples."""
    if page.bits != {8} or page.first(_PLANAR, 1) != 1 or page.has(_EXTRA):
        return False
    colour = (page.first(_PHOTOMETRIC, -1), page.first(_SAMPLES, 1))
    return page.first(_SAMPLE_FORMAT, 1) == 1 and colour in ((1, 1), (2, 3), (5, 4))


def _check_kind(page: TiffPage) -> None:
    bits = page.bits
    readable = (
        page.first(_PHOTOMETRIC, 1) in _COLOURS
        and (page.has(_PHOTOMETRIC) or page.first(_SAMPLES, 1) == 1)
        and page.first(_COMPRESSION, 1) in _READABLE
        and len(bits) == 1
        and bits <= {1, 2, 4, 8, 16, 32}
        and not (page.first(_PLANAR, 1) == 2 and page.first(_SAMPLES, 1) > 1 and _is_coded(page))
    )
    if not readable:
        raise Unsupported(page.describe())


def _check_samples(page: TiffPage, max_pixels: int) -> None:
    """Raise TooLarge where the page has many more samples than an image of ``max_pixels``.

    libvips holds a strip or a tile with all of its samples, those that are dropped included. Of
    planes only those of the colours are read.
    """
    samples, bits = page.first(_SAMPLES, 1), page.first(_BITS, 1)
    if page.first(_PLANAR, 1) == 2:
        samples = min(samples, _COLOURS[page.first(_PHOTOMETRIC, 1)])
    tile = page.first(_TILE_WIDTH, 1), page.first(_TILE_HEIGHT, 1)
    for width, height in (page.size, tile):
        nbytes = width * height * samples * bits // 8
        if nbytes > (most := _MAX_PIXEL_NBYTES * max_pixels):
            raise TooLarge(
                f"{width}×{height} of {samples} samples of {bits} bits is {nbytes} bytes; this run "
                f"takes up to {most}, {_MAX_PIXEL_NBYTES} for each of {max_pixels} pixels"
            )


def _is_coded(page: TiffPage) -> bool:
    """Return whether a plane alone says nothing: YCbCr, and JPEG, whose tables are shared."""
    return page.first(_PHOTOMETRIC, 1) in (3, 6) or page.first(_COMPRESSION, 1) in (6, 7)


def _by_strips(data: bytes, index: int, page: TiffPage) -> NDArray[np.uint8] | None:
    """RGB of a very large page, on disk; None for others, and where the disk has no room.

    A few rows at a time are in memory, or a row of the file's own tiles.
    """
    width, height = page.size
    plain = page.bits == {8} and page.first(_SAMPLE_FORMAT, 1) == 1
    if width * height < STRIPED_PIXELS or not plain or page.orientation != 1:
        return None
    pixels = on_disk(height, width)
    if pixels is None:
        return None
    check_room(2 * len(data))  # libvips copies its input
    with _told_by_vips(page):
        try:
            _fill(pixels, data, index, page, _bands)
        except libvips().Error as exc:
            if "out of order" not in str(exc):
                raise
            _fill(pixels, data, index, page, _bands_of_one_region)
    return pixels


_Bands = Callable[[Any, int], Iterator[NDArray[np.uint8]]]


def _fill(
    pixels: NDArray[np.uint8], data: bytes, index: int, page: TiffPage, bands: _Bands
) -> None:
    """Write a page's RGB into ``pixels`` on disk, in bands of ``_rows_at_once``."""
    colours, rows = _COLOURS[page.first(_PHOTOMETRIC, 1)], _rows_at_once(page)
    image = libvips().Image.tiffload_buffer(data, page=index, access="sequential", fail_on="error")
    image = first_bands(image, colours)
    check_room(3 * rows * image.width * image.bands)
    top = 0
    for samples in bands(image, rows):
        pixels[top : top + rows] = _eight_bits(samples, page, "full", [])
        let_go(pixels)
        top += rows


def _rows_at_once(page: TiffPage) -> int:
    """Return how many rows to read at a time: whole tiles, and whole strips if they are small."""
    unit = page.first(_TILE_HEIGHT, 0) or min(page.first(_ROWS_PER_STRIP, 1), _STRIP_ROWS) or 1
    return unit * -(-_STRIP_ROWS // unit)


def _bands(image: Any, rows: int) -> Iterator[NDArray[np.uint8]]:
    """Yield samples [rows, W, channels], each band evaluated by itself.

    libvips then forgets the part of the file that it is in. Where the next band begins inside of
    that part, it refuses to go back: "out of order read".
    """
    for top in range(0, image.height, rows):
        yield vips_samples(image.crop(0, top, image.width, min(rows, image.height - top)))


def _bands_of_one_region(image: Any, rows: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the same, in one evaluation, which remembers, and holds some thousand rows."""
    region = libvips().Region.new(image)
    for top in range(0, image.height, rows):
        here = min(rows, image.height - top)
        samples = np.frombuffer(region.fetch(0, top, image.width, here), np.uint8)
        yield samples.reshape(here, image.width, image.bands)


@contextmanager
def _told_by_vips(page: TiffPage) -> Iterator[None]:
    """Translate what libvips raises while it reads a page."""
    try:
        yield
    except libvips().Error as exc:
        reason = " ".join(str(exc).split())[:200]
        if any(word in reason for word in _VIPS_CANNOT):
            raise Unsupported(page.describe()) from exc
        if any(word in reason for word in _ABOUT_TAGS):
            raise _DamagedTags(reason) from exc
        raise Undecodable(f"damaged TIFF: {reason}") from exc


def _as_stored(data: bytes, page: TiffPage) -> NDArray[np.uint8] | None:
    """Samples of a plain page without compression, copied out of its strips; None for others.

    libvips takes several times as long for them. A page with a strip that is missing, short or
    beyond the file's end is left to libvips, which says what is wrong.
    """
    colours = {1: 1, 2: 3}.get(page.first(_PHOTOMETRIC, 1))
    if not (_is_plain(page) and page.first(_COMPRESSION, 1) == 1 and colours):
        return None
    if page.has(_TILE_WIDTH) or page.first(_FILL_ORDER, 1) != 1:
        return None
    width, height = page.size
    rows = min(height, page.first(_ROWS_PER_STRIP, height))
    starts, counts = page.values(_STRIP_OFFSETS), page.values(_STRIP_NBYTES)
    if rows < 1 or not len(starts) == len(counts) == -(-height // rows):
        return None
    samples = np.empty((height, width * colours), np.uint8)
    for at, start, count in zip(range(0, height, rows), starts, counts, strict=True):
        strip = samples[at : at + rows]
        if count < strip.size or int(start) + strip.size > len(data):
            return None
        strip[:] = np.frombuffer(data, np.uint8, strip.size, int(start)).reshape(strip.shape)
    return samples.reshape(height, width, colours)


def _by_vips(data: bytes, index: int, page: TiffPage) -> NDArray[Any]:
    """Colour samples [H, W, channels] as stored, palettes and inverted grey resolved."""
    check_room(2 * len(data))  # libvips copies its input
    with _told_by_vips(page):
        image = libvips().Image.tiffload_buffer(
            data, page=index, access="sequential", fail_on="error"
        )
        return vips_samples(image, _COLOURS[page.first(_PHOTOMETRIC, 1)])


def _eight_bits(
    samples: NDArray[Any], page: TiffPage, value_range: ValueRange, warnings: list[str]
) -> NDArray[np.uint8]:
    """Colour samples as RGB; alpha and further channels are dropped."""
    colours = _COLOURS[page.first(_PHOTOMETRIC, 1)]
    samples = samples[..., : colours if samples.shape[2] >= colours else 1]
    if samples.dtype != np.uint8:
        bits = 16 if samples.dtype == np.uint16 else None
        try:
            samples = to_8_bits(samples, value_range, bits=bits, warnings=warnings)
        except Unsupported as exc:
            raise Unsupported(f"{page.describe()}: {exc.message}") from exc
    if colours == 4 and samples.shape[2] == 4:
        return np.asarray(Image.fromarray(samples, "CMYK").convert("RGB"))
    return as_rgb(samples)

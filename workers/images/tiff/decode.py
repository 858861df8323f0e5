"""Pixels of a TIFF, read by libvips.

Pillow reads planar samples, 16 bits, palettes, inverted grey and subsampled YCbCr wrongly or not at
all. It is asked only where libvips stumbles over tags that the pixels do not depend on, or lacks a
codec.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    vips_samples,
    whole_image,
)
from workers.images.preprocessing import ValueRange
from workers.images.tiff import tags
from workers.images.tiff.directories import TiffPage, TiffPages

# From this size on a page is read in strips, and lies on disk: 192 MiB of RGB.
STRIPED_PIXELS, _STRIP_ROWS = 1 << 26, 128
# Where the pixels lie, one value for each piece of each plane; and how each piece is packed.
_WHERE = (tags.STRIP_OFFSETS, tags.STRIP_NBYTES, tags.TILE_OFFSETS, tags.TILE_NBYTES)
_LAYOUT = (
    tags.WIDTH, tags.HEIGHT, tags.COMPRESSION, tags.FILL_ORDER, tags.ROWS_PER_STRIP,
    tags.T4_OPTIONS, tags.T6_OPTIONS, tags.PREDICTOR, tags.TILE_WIDTH, tags.TILE_HEIGHT,
)  # fmt: skip
_MAX_PROFILE_NBYTES = 1 << 20
# What all samples of a page may take for each of max_pixels: as much as CMYK of 32 bits.
_MAX_PIXEL_NBYTES = 16
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 3, 5: 4, 6: 3}  # samples that are colour, by photometric
# In libvips' messages: it has no code for this kind; the pixels are not affected.
_VIPS_CANNOT = (
    "not configured", "not supported", "nsupported", "can not handle", "samples_per_pixel",
    "samples out of range", "not implemented",
)  # fmt: skip
_ABOUT_TAGS = ("custom tag", "bad seek", "IFD")
_PILLOWS = (6, 34925)  # old JPEG and LZMA are not in every libtiff; Pillow has its own
_READABLE = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000, 50001})


def decode_tiff(
    data: bytes, pages: TiffPages | None, max_pixels: int, value_range: ValueRange
) -> DecodedImage:
    """Decode the main page. Raises as ``decode``, or whatever Pillow and libvips raise."""
    if pages is None:
        raise Undecodable("damaged TIFF: no image directory")
    index, page = pages.index, pages.main
    check_pixels(*page.size, max_pixels)
    # A tile is decoded whole, however small the image that it is cut from.
    check_pixels(page.first(tags.TILE_WIDTH, 1), page.first(tags.TILE_HEIGHT, 1), max_pixels)
    _check_kind(page)
    _check_samples(page, max_pixels)
    profile = page.values(tags.ICC)[:_MAX_PROFILE_NBYTES].astype(np.uint8).tobytes()
    warnings = profile_warning(profile)
    extra, colours = page.count(tags.EXTRA), _COLOURS[page.first(tags.PHOTOMETRIC, 1)]
    if (bands := page.first(tags.SAMPLES, 1)) > colours + extra:
        warnings.append(f"ignored bands: its tags name {colours + extra} of {bands} samples")
    try:
        planes = page.first(tags.PLANAR, 1) == 2 and page.first(tags.SAMPLES, 1) > 1
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
        if index > 0 or not _is_plain(page) or page.first(tags.COMPRESSION, 1) not in _PILLOWS:
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
    photometric = page.first(tags.PHOTOMETRIC, 1)
    colours = _COLOURS[photometric]
    planes = [_by_vips(_plane(data, page, k), 0, page) for k in range(colours)]
    return np.dstack([plane[..., 0] for plane in planes])


def _plane(data: bytes, page: TiffPage, index: int) -> bytes:
    """Return the TIFF with an appended directory that describes a single plane, as grey."""
    samples = page.first(tags.SAMPLES, 1)
    kept = {tag: page.values(tag)[:1] for tag in _LAYOUT if page.has(tag)}
    for tag in _WHERE:
        if count := page.count(tag):
            share = count // samples
            kept[tag] = page.values(tag)[index * share : (index + 1) * share]
    inverted = page.first(tags.PHOTOMETRIC, 1) == 0
    single = {
        tags.BITS: page.first(tags.BITS, 1),
        tags.PHOTOMETRIC: int(not inverted),
        tags.SAMPLES: 1,
        tags.SAMPLE_FORMAT: page.first(tags.SAMPLE_FORMAT, 1),
    }
    kept |= {tag: np.array([value]) for tag, value in single.items()}
    order, big = ("<" if data[:2] == b"II" else ">"), data[2:4] in (b"+\0", b"\0+")
    wide, kind, entry = ("Q", 16, 20) if big else ("I", 4, 12)
    size = struct.calcsize(f"={wide}")
    at = len(data) + len(data) % 2
    values_at = at + (8 if big else 2) + entry * len(kept) + size
    directory = struct.pack(order + ("Q" if big else "H"), len(kept))
    behind = b""
    for tag, values in sorted(kept.items()):
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
    if page.bits != {8} or page.first(tags.PLANAR, 1) != 1 or page.has(tags.EXTRA):
        return False
    colour = (page.first(tags.PHOTOMETRIC, -1), page.first(tags.SAMPLES, 1))
    return page.first(tags.SAMPLE_FORMAT, 1) == 1 and colour in ((1, 1), (2, 3), (5, 4))


def _check_kind(page: TiffPage) -> None:
    bits = page.bits
    readable = (
        page.first(tags.PHOTOMETRIC, 1) in _COLOURS
        and (page.has(tags.PHOTOMETRIC) or page.first(tags.SAMPLES, 1) == 1)
        and page.first(tags.COMPRESSION, 1) in _READABLE
        and len(bits) == 1
        and bits <= {1, 2, 4, 8, 16, 32}
        and not (
            page.first(tags.PLANAR, 1) == 2 and page.first(tags.SAMPLES, 1) > 1 and _is_coded(page)
        )
    )
    if not readable:
        raise Unsupported(page.describe())


def _check_samples(page: TiffPage, max_pixels: int) -> None:
    """Raise TooLarge where the page has many more samples than an image of ``max_pixels``.

    libvips holds a strip or a tile with all of its samples, those that are dropped included. Of
    planes only those of the colours are read.
    """
    samples, bits = page.first(tags.SAMPLES, 1), page.first(tags.BITS, 1)
    if page.first(tags.PLANAR, 1) == 2:
        samples = min(samples, _COLOURS[page.first(tags.PHOTOMETRIC, 1)])
    tile = page.first(tags.TILE_WIDTH, 1), page.first(tags.TILE_HEIGHT, 1)
    for width, height in (page.size, tile):
        nbytes = width * height * samples * bits // 8
        if nbytes > (most := _MAX_PIXEL_NBYTES * max_pixels):
            raise TooLarge(
                f"{width}×{height} of {samples} samples of {bits} bits is {nbytes} bytes; this run "
                f"takes up to {most}, {_MAX_PIXEL_NBYTES} for each of {max_pixels} pixels"
            )


def _is_coded(page: TiffPage) -> bool:
    """Return whether a plane alone says nothing: YCbCr, and JPEG, whose tables are shared."""
    return page.first(tags.PHOTOMETRIC, 1) in (3, 6) or page.first(tags.COMPRESSION, 1) in (6, 7)


def _by_strips(data: bytes, index: int, page: TiffPage) -> NDArray[np.uint8] | None:
    """RGB of a very large page, on disk; None for others, and where the disk has no room.

    A few rows at a time are in memory, or a row of the file's own tiles.
    """
    width, height = page.size
    plain = page.bits == {8} and page.first(tags.SAMPLE_FORMAT, 1) == 1
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
    colours, rows = _COLOURS[page.first(tags.PHOTOMETRIC, 1)], _rows_at_once(page)
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
    unit = (
        page.first(tags.TILE_HEIGHT, 0) or min(page.first(tags.ROWS_PER_STRIP, 1), _STRIP_ROWS) or 1
    )
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
    colours = {1: 1, 2: 3}.get(page.first(tags.PHOTOMETRIC, 1))
    if not (_is_plain(page) and page.first(tags.COMPRESSION, 1) == 1 and colours):
        return None
    if page.has(tags.TILE_WIDTH) or page.first(tags.FILL_ORDER, 1) != 1:
        return None
    width, height = page.size
    rows = min(height, page.first(tags.ROWS_PER_STRIP, height))
    starts, counts = page.values(tags.STRIP_OFFSETS), page.values(tags.STRIP_NBYTES)
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
        return vips_samples(image, _COLOURS[page.first(tags.PHOTOMETRIC, 1)])


def _eight_bits(
    samples: NDArray[Any], page: TiffPage, value_range: ValueRange, warnings: list[str]
) -> NDArray[np.uint8]:
    """Colour samples as RGB; alpha and further channels are dropped."""
    colours = _COLOURS[page.first(tags.PHOTOMETRIC, 1)]
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

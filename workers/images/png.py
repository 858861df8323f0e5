"""PNG: chunks are checked here (W3C PNG, third edition), pixels are decoded by libvips, strictly.

Pillow stops reading when it has enough rows: it never sees the checksum of the compressed data, and
takes an animation's later frame for the first where chunks are out of order.
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import PngImagePlugin

from storage.errors import Undecodable, Unsupported
from workers.images.pixels import (
    DecodedImage,
    as_rgb,
    check_pixels,
    check_room,
    libvips,
    profile_warning,
    to_8_bits,
    upright,
    vips_samples,
    whole_image,
)
from workers.images.preprocessing import ValueRange

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
# Bits a sample by colour type: grey, RGB, palette, grey and alpha, RGBA.
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_COLOURED = (2, 3, 6)
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_SEVERAL = frozenset({b"IDAT", b"fcTL", b"fdAT", b"sPLT", *_TEXTS})  # the others come once
_KEPT = frozenset({b"eXIf", b"iCCP", b"acTL", *_TEXTS})
# Header and pixel of the smallest PNG, in which Pillow is shown the metadata alone.
_ONE_PIXEL = (b"\0\0\0\1\0\0\0\1\x08\0\0\0\0", zlib.compress(b"\0\0"))
_MAX_PROFILE_NBYTES = 1 << 20

OrientationOf = Callable[[bytes], int | None]


@dataclass(slots=True)
class PngFile:
    """A PNG whose critical chunks are in order and whole.

    Attributes:
        width, height, bits, colour: of its header.
        pixels: the chunks that the pixels depend on by name, with their lengths and checksums.
        metadata: bodies of the chunks that tell the orientation, by order.
        profile: the compressed colour profile; empty: none.
        frames: what an animation says, 1 otherwise.
        warnings: damage that the pixels do not depend on.
    """

    width: int
    height: int
    bits: int
    colour: int
    pixels: list[tuple[bytes, memoryview]] = field(default_factory=list)
    metadata: list[tuple[bytes, bytes]] = field(default_factory=list)
    profile: bytes = b""
    frames: int = 1
    warnings: list[str] = field(default_factory=list)


def decode_png(
    data: bytes, max_pixels: int, value_range: ValueRange, orientation_of: OrientationOf
) -> DecodedImage:
    """Decode the static image, which is an animation's first frame or stands in for it.

    Args:
        orientation_of: reads the orientation from EXIF bytes; None: they do not say.
    """
    png = read_png(data, max_pixels)
    warnings = png.warnings
    samples = _samples(png)
    if samples.dtype != np.uint8:
        samples = to_8_bits(samples, value_range, bits=16, warnings=warnings)
    orientation = _orientation(png, orientation_of)
    warnings += profile_warning(_profile(png))
    return whole_image(upright(as_rgb(samples), orientation), orientation, png.frames, warnings)


def png_size(data: bytes, orientation_of: OrientationOf) -> tuple[int, int, int]:
    """(width, height, orientation) as stored. Raises Undecodable where no header is at its place.

    Damage further back does not matter.
    """
    if data[12:16] != b"IHDR" or len(data) < 24:
        raise Undecodable("damaged PNG: it does not begin with its header")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    found = PngFile(width, height, 8, 0)
    for name, start, end in _chunks(data):
        if (name in _TEXTS or name == b"eXIf") and end <= len(data):
            found.metadata.append((name, data[start + 8 : end - 4]))
    return width, height, _orientation(found, orientation_of)


def read_png(data: bytes, max_pixels: int) -> PngFile:
    """Check the chunks and sort them by what they are for.

    Raises:
        TooLarge: more than ``max_pixels``.
        Undecodable: a critical chunk is missing, doubled, damaged or out of place.
        Unsupported: a critical chunk that is not in the standard, such as Apple's CgBI.
    """
    chunks = list(_chunks(data))
    png = _header(data, chunks)
    check_pixels(png.width, png.height, max_pixels)
    _check_order(chunks)
    seen: Counter[bytes] = Counter()
    view = memoryview(data)
    for name, start, end in chunks:
        whole = end <= len(data)
        right = whole and zlib.crc32(view[start + 4 : end - 4]) == _int(data, end - 4)
        if name in _CRITICAL:
            if not right and name != b"IEND":
                what = "wrong checksum of" if whole else "the file ends in"
                raise Undecodable(f"damaged PNG: {what} its chunk {name.decode()}")
            png.pixels.append((name, view[start:end]))
        elif not right or (seen[name] and name not in _SEVERAL):
            what = "appears twice" if right else "has a wrong checksum" if whole else "is cut off"
            png.warnings.append(f"corrupt data: chunk {name.decode('latin-1')!r} {what}")
            continue
        seen[name] += 1
        if name not in _CRITICAL:
            _sort_in(png, name, view[start:end], late=seen[b"IDAT"] > 0)
    _check_end(png, data, chunks)
    return png


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk up to IEND, length and checksum included."""
    at, name = len(SIGNATURE), b""
    while at + 8 <= len(data) and name != b"IEND":
        start, name = at, data[at + 4 : at + 8]
        at += 12 + _int(data, at)
        yield name, start, at


def _int(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _header(data: bytes, chunks: list[tuple[bytes, int, int]]) -> PngFile:
    if not chunks or chunks[0][0] != b"IHDR":
        if chunks and chunks[0][0] == b"CgBI":
            raise Unsupported("PNG with Apple's CgBI chunk, which other readers do not know")
        raise Undecodable("damaged PNG: it does not begin with its header")
    _, start, end = chunks[0]
    if end - start != 25 or end > len(data):
        raise Undecodable("damaged PNG: its header is not 13 bytes long")
    bits, colour, compression, filtering, interlace = data[24:29]
    if bits not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise Undecodable(
            f"damaged PNG: a header with {bits} bits, colour type {colour}, compression "
            f"{compression}, filter {filtering}, interlace {interlace}"
        )
    return PngFile(_int(data, 16), _int(data, 20), bits, colour)


def _check_order(chunks: list[tuple[bytes, int, int]]) -> None:
    names = [name for name, _, _ in chunks]
    for name in names:
        if not name[0] & 0x20 and name not in _CRITICAL:
            raise (Unsupported if name.isalpha() else Undecodable)(f"PNG with a chunk {name!r}")
    if names.count(b"IHDR") > 1 or names.count(b"PLTE") > 1:
        raise Undecodable("damaged PNG: two headers or palettes")
    if b"IDAT" not in names:
        raise Undecodable("damaged PNG: no pixels")
    first, count = names.index(b"IDAT"), names.count(b"IDAT")
    if names[first : first + count] != [b"IDAT"] * count:
        raise Undecodable("damaged PNG: something lies between its pixels")
    if b"PLTE" in names[first:]:
        raise Undecodable("damaged PNG: its palette comes after its pixels")


def _sort_in(png: PngFile, name: bytes, chunk: memoryview, *, late: bool) -> None:
    if name not in _KEPT:
        return
    body = bytes(chunk[8:-4])
    if name in _TEXTS or name == b"eXIf":
        png.metadata.append((name, body))
        if name == b"eXIf" and body[:4] not in (b"II*\0", b"MM\0*"):
            png.warnings.append("corrupt data: its EXIF has no TIFF header")
    elif name == b"iCCP" and not late:
        png.profile = body
    elif name == b"acTL" and not late and len(body) == 8 and 0 < _int(body, 0) < 1 << 31:
        png.frames = _int(body, 0)


def _check_end(png: PngFile, data: bytes, chunks: list[tuple[bytes, int, int]]) -> None:
    name, _, end = chunks[-1]
    names = [name for name, _, _ in chunks]
    if png.colour == 3 and b"PLTE" not in names:
        raise Undecodable("damaged PNG: a palette image without its palette")
    if png.frames > 1 and b"fcTL" not in names[: names.index(b"IDAT")]:
        png.frames += 1  # the static image is not a frame of the animation
    if name != b"IEND" or end > len(data):
        png.warnings.append("premature end: the pixels are whole, the end chunk is missing")
    elif behind := len(data) - end:
        png.warnings.append(f"trailing bytes: {behind} after the image's end")


def _samples(png: PngFile) -> NDArray[Any]:
    """[H, W, colours] of 8 or 16 bits, palettes resolved, without alpha.

    libvips does not see the transparency chunk, which would only add a channel.
    """
    vips = libvips()
    wanted = (b"IHDR", b"PLTE", b"IDAT") if png.colour in _COLOURED else (b"IHDR", b"IDAT")
    chunks = [chunk for name, chunk in png.pixels if name in wanted]
    plain = b"".join([SIGNATURE, *chunks, _chunk(b"IEND", b"")])
    check_room(2 * len(plain))  # it copies its input
    try:
        image = vips.Image.pngload_buffer(
            plain, access="sequential", fail_on="warning", unlimited=True
        )
        samples = vips_samples(image, 3 if png.colour in _COLOURED else 1)
    except vips.Error as exc:
        reason = " ".join(str(exc).split())[:200]
        raise Undecodable(f"damaged PNG: its pixels cannot be read ({reason})") from exc
    return samples


def _chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def _orientation(png: PngFile, orientation_of: OrientationOf) -> int:
    """Return 1-8, from EXIF, or else from XMP or ImageMagick's text as Pillow reads them."""
    for name, body in png.metadata:
        if name == b"eXIf" and (said := orientation_of(body)) is not None:
            return said
    texts = [(name, body) for name, body in png.metadata if name in _TEXTS]
    return _said_in_text(tuple(texts)) if texts else 1


def _said_in_text(texts: tuple[tuple[bytes, bytes], ...]) -> int:
    parts = [_chunk(b"IHDR", _ONE_PIXEL[0]), *(_chunk(*text) for text in texts)]
    parts += [_chunk(b"IDAT", _ONE_PIXEL[1]), _chunk(b"IEND", b"")]
    try:
        image = PngImagePlugin.PngImageFile(io.BytesIO(b"".join([SIGNATURE, *parts])))
        value = image.getexif().get(0x0112)
    except Exception:  # noqa: BLE001  damaged or oversized text: the pixels are fine
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _profile(png: PngFile) -> bytes:
    _, _, packed = png.profile.partition(b"\0")
    try:
        return zlib.decompressobj().decompress(packed[1:], _MAX_PROFILE_NBYTES)
    except zlib.error:
        return b""

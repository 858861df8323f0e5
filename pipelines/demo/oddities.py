"""Image files as real collections hold them: unusual ones to be labelled, and broken ones.

``ODD`` encodes a page so that it is readable in an unusual way; ``BROKEN`` spoils it. Each maps a
kind's name to (file ending, pixels → bytes).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Encoder = Callable[[Pixels], bytes]

_EXIF_ORIENTATION = 0x0112


def jpeg(pixels: Pixels, quality: int = 85) -> bytes:
    """Encode as a plain baseline JPEG."""
    return _saved(Image.fromarray(pixels), "JPEG", quality=quality)


def png(pixels: Pixels) -> bytes:
    """Encode as a plain RGB PNG."""
    return _saved(Image.fromarray(pixels), "PNG", compress_level=1)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif_rotated(pixels: Pixels) -> bytes:
    """Encode lying on its side, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6  # viewers turn it a quarter clockwise
    return _saved(Image.fromarray(np.rot90(pixels).copy()), "JPEG", quality=85, exif=exif)


def _cmyk(pixels: Pixels) -> bytes:
    return _saved(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=90)


def _grey(pixels: Pixels) -> bytes:
    return _saved(Image.fromarray(pixels).convert("L"), "JPEG", quality=85)


def _sixteen_bit(pixels: Pixels) -> bytes:
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.uint16) * 257
    return _saved(Image.fromarray(grey), "PNG", compress_level=1)


def _palette(pixels: Pixels) -> bytes:
    return _saved(Image.fromarray(pixels).quantize(128), "PNG")


def _alpha(pixels: Pixels) -> bytes:
    return _saved(Image.fromarray(pixels).convert("RGBA"), "PNG", compress_level=1)


def _webp(pixels: Pixels) -> bytes:
    return _saved(Image.fromarray(pixels), "WEBP", quality=85)


def _truncated(pixels: Pixels) -> bytes:
    whole = jpeg(pixels)
    return whole[: len(whole) // 3]


def _empty(pixels: Pixels) -> bytes:
    return b""


def _text(pixels: Pixels) -> bytes:
    return b"These are notes, saved under the name of a picture.\n" * 20


def _bomb(pixels: Pixels) -> bytes:
    """Return a PNG of a few hundred bytes whose header announces 30,000×30,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(90_001))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


ODD: dict[str, tuple[str, Encoder]] = {
    "exif_rotated": (".jpg", _exif_rotated),
    "cmyk": (".jpg", _cmyk),
    "grey": (".jpg", _grey),
    "png_named_jpg": (".jpg", png),
    "sixteen_bit": (".png", _sixteen_bit),
    "palette": (".png", _palette),
    "alpha": (".png", _alpha),
    "webp": (".webp", _webp),
}
BROKEN: dict[str, tuple[str, Encoder]] = {
    "truncated": (".jpg", _truncated),
    "empty": (".jpg", _empty),
    "text_named_jpg": (".jpg", _text),
    "huge_header": (".png", _bomb),
}

"""What a JPEG's markers say, read without decoding anything (ITU-T T.81, annex B)."""

from __future__ import annotations

from dataclasses import dataclass

_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # less DHT, JPG, DAC
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RSTn, SOI: no length follows


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The frame header and what came before it.

    Attributes:
        width, height: in pixels as stored, before any EXIF orientation.
        components: 1 grey, 3 YCbCr or RGB, 4 CMYK or YCCK.
        has_metadata: an APP1 segment (EXIF or XMP) precedes the frame.
    """

    width: int
    height: int
    components: int
    has_metadata: bool


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None when no frame header can be found."""
    at, has_metadata = 2, False
    while (at := data.find(b"\xff", at)) >= 0:
        while at < len(data) and data[at] == 0xFF:
            at += 1
        if at + 3 > len(data):
            return None
        marker = data[at]
        at += 1
        if marker == 0 or marker in _STANDALONE:
            continue
        if marker in _FRAME_MARKERS:
            return _frame(data[at : at + 8], has_metadata)
        if marker in (0xD9, 0xDA):  # the image ends, or begins, without a frame header
            return None
        has_metadata = has_metadata or marker == 0xE1
        at += int.from_bytes(data[at : at + 2], "big")
    return None


def _frame(segment: bytes, has_metadata: bool) -> JpegHeader | None:
    if len(segment) < 8:
        return None
    height = int.from_bytes(segment[3:5], "big")
    width = int.from_bytes(segment[5:7], "big")
    return JpegHeader(width, height, segment[7], has_metadata) if width and height else None


def count_scans(data: bytes) -> int:
    """Start-of-scan markers: each costs a decoder one pass over the whole image.

    In image data FF is never followed by DA, so counting bytes is exact but for thumbnails.
    """
    return data.count(b"\xff\xda")


def has_end(data: bytes) -> bool:
    """Whether the end-of-image marker follows the last scan; a cut file lacks it."""
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")

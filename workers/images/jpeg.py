"""JPEG: what its markers say (ITU-T T.81, annex B), and its pixels through libjpeg-turbo."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from storage.errors import TooLarge, Undecodable, Unsupported
from workers.images.letterbox import shrink
from workers.images.pixels import (
    DecodedImage,
    check_pixels,
    joined,
    profile_warning,
    upright,
)
from workers.images.preprocessing import Preprocessing

_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # less DHT, JPG, DAC
_UNREADABLE_FRAMES = {
    0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical",
    0xCB: "lossless", 0xCD: "hierarchical", 0xCE: "hierarchical", 0xCF: "hierarchical",
}  # fmt: skip
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RSTn, SOI: no length follows
# What may stand between two scans: tables, application data, a comment, the next scan, the end.
_BETWEEN_SCANS = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xDA, 0xD9, 0xFE, *range(0xE0, 0xF0)})
# In entropy-coded data FF is followed by 00 or a restart marker; FF before FF fills.
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_MAX_SCAN_PASSES = 64  # a progressive JPEG may cost that many passes over max_pixels
_MAX_SCANS = 4096  # each of 14 bits of each of 64 coefficients of 4 components: 3,584
_FIRST_PIECE_NBYTES, _PIECE_NBYTES = 1 << 14, 1 << 20
_ICC, _MPF = b"ICC_PROFILE\0", b"MPF\0"

OrientationOf = Callable[[bytes], int]
SlowDecoder = Callable[[bytes], NDArray[np.uint8]]


class JpegHeader(NamedTuple):
    """What precedes the first scan.

    Attributes:
        width, height: in pixels as stored, before any EXIF orientation.
        components: 1 grey, 3 YCbCr or RGB, 4 CMYK or YCCK.
        precision: bits a sample.
        frame_marker: 0xC0 baseline, 0xC2 progressive, ...
        has_metadata: an APP1 segment (EXIF or XMP) precedes the frame.
        icc: the first piece of a colour profile before the frame, which holds its name; empty:
            none.
        is_mpo: an APP2 segment says where further pictures lie in the file (CIPA DC-007).
        scan_at: where the marker of the first scan stands, or the end marker if there is no scan;
            the number of bytes if there is neither.
    """

    width: int
    height: int
    components: int
    precision: int
    frame_marker: int
    has_metadata: bool
    icc: bytes
    is_mpo: bool
    scan_at: int


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Return the header of a JPEG; None if it lacks a frame header."""
    at, nbytes, frame = 2, len(data), None
    has_metadata, icc, is_mpo = False, b"", False
    while (at := data.find(b"\xff", at)) >= 0:
        while at < nbytes and data[at] == 0xFF:
            at += 1
        if at + 1 > nbytes:
            break
        marker = data[at]
        if marker in (0xD9, 0xDA):  # the image ends, or begins
            nbytes = at - 1
            break
        at += 1
        if marker == 0 or marker in _STANDALONE:
            continue
        if marker == 0xE2:
            is_mpo = is_mpo or data[at + 2 : at + 6] == _MPF
        if frame is None:
            if marker in _FRAME_MARKERS:
                frame = _frame(marker, data[at : at + 8])
                if frame is None:
                    return None
            has_metadata = has_metadata or marker == 0xE1
            if marker == 0xE2 and not icc and data[at + 2 : at + 14] == _ICC:
                icc = data[at + 16 : at + int.from_bytes(data[at : at + 2], "big")]
        at += int.from_bytes(data[at : at + 2], "big")
    return None if frame is None else JpegHeader(*frame, has_metadata, icc, is_mpo, nbytes)


def _frame(marker: int, segment: bytes) -> tuple[int, int, int, int, int] | None:
    """Return the first five fields of a ``JpegHeader``; None where the segment is cut or empty."""
    if len(segment) < 8:
        return None
    height, width = int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[5:7], "big")
    if not width or not height:
        return None
    return width, height, segment[7], segment[2], marker


def find_end(data: bytes, scan_at: int) -> tuple[int | None, int]:
    """Return (where the image's own end marker ends, scans up to there).

    The markers are followed from segment to segment and from scan to scan, so that a thumbnail in
    front and a second image or a video behind are neither. None where the markers lead past the
    end of the data, or to more than ``_MAX_SCANS`` scans: of tiny ones there could be millions.

    Args:
        scan_at: from the header.
    """
    at, scans, nbytes = scan_at, 0, len(data)
    while at + 2 <= nbytes:
        if data[at] != 0xFF:  # damaged: as libjpeg does, look for the next marker
            at = data.find(b"\xff", at)
            if at < 0:
                break
            continue
        marker = data[at + 1]
        if marker == 0xD9:
            return at + 2, scans
        if marker in (0, 0xFF) or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            scans += 1
            if scans > _MAX_SCANS:
                break
            at = _end_of_scan(data, at)
    return None, scans


def _end_of_scan(data: bytes, at: int) -> int:
    """Return where the first marker behind a scan stands; the number of bytes if there is none.

    By NumPy, which lets other threads run meanwhile, up to a first marker that may also be inside
    of the scan; a piece at a time, since what is compared takes as much memory again. The first
    piece is small, or a file of very many tiny scans would cost a large one each.
    """
    most = _FIRST_PIECE_NBYTES
    while (nbytes := min(most, len(data) - at)) > 1:
        piece = np.frombuffer(data, np.uint8, nbytes, at)
        found = (piece[:-1] == 0xFF) & (piece[1:] != 0)
        first = int(found.argmax())
        if found[first]:
            at += first
            return at if data[at + 1] in _BETWEEN_SCANS else _next_between_scans(data, at)
        at += nbytes - 1
        most = min(2 * most, _PIECE_NBYTES)
    return len(data)


def _next_between_scans(data: bytes, at: int) -> int:
    while found := _MARKER_IN_SCAN.search(data, at):
        at = found.start()
        if data[at + 1] in _BETWEEN_SCANS:
            return at
        at += 2  # damaged
    return len(data)


def own_bytes(data: bytes, end: int | None) -> tuple[bytes, list[str]]:
    """Return (the image without what follows it, warnings).

    Args:
        end: from ``find_end``.

    Raises:
        Undecodable: no end marker follows the last scan.
    """
    if end is None:
        # Damage can lead the walk past the end; the marker must still be there.
        last = data.rfind(b"\xff\xd9")
        if last <= data.rfind(b"\xff\xda"):
            raise Undecodable("truncated JPEG: it ends without its end marker")
        end = last + 2
    behind = len(data) - end
    if not behind:
        return data, []
    return data[:end], [f"trailing bytes: {behind} after the image's end"]


def decode_jpeg(
    data: bytes,
    header: JpegHeader,
    max_pixels: int,
    enough: Preprocessing | None,
    orientation_of: OrientationOf,
    slow: SlowDecoder,
) -> DecodedImage:
    """Decode a JPEG, at a fraction of its size where ``enough`` allows it.

    Args:
        header: from ``read_jpeg_header``.
        orientation_of: reads the EXIF orientation.
        slow: Pillow's pixels and remarks, for what libjpeg-turbo alone does not settle.
    """
    _check_kind(header)
    check_pixels(header.width, header.height, max_pixels)
    end, scans = find_end(data, header.scan_at)
    _check_scans(scans, header, max_pixels)
    data, warnings = own_bytes(data, end)
    orientation = orientation_of(data) if header.has_metadata else 1
    height, width = header.height, header.width
    if orientation >= 5:
        height, width = width, height
    factor = 1 if enough is None else _dct_factor(height, width, orientation, enough)
    warnings += profile_warning(header.icc)
    pixels: NDArray[np.uint8] | None = None
    if header.components in (1, 3, 4):
        pixels, remark = _fast_jpeg(data, header, factor)
        warnings += remark
    if header.components == 4:
        pixels = None  # Pillow's way to RGB; libjpeg was asked for its remarks, which Pillow hides
    if pixels is None:
        pixels, factor = slow(data), 1
    turned = upright(pixels, orientation)
    return DecodedImage(turned, orientation, (height, width), factor, 1, joined(warnings))


def _check_kind(header: JpegHeader) -> None:
    kind = _UNREADABLE_FRAMES.get(header.frame_marker)
    if kind is not None or header.precision != 8:
        name = f"{kind} JPEG" if kind else "JPEG"
        raise Unsupported(f"{name} of {header.precision} bits, {header.components} components")


def _check_scans(scans: int, header: JpegHeader, max_pixels: int) -> None:
    """Refuse a JPEG that costs too many passes."""
    if scans > _MAX_SCANS:
        raise TooLarge(f"more than {_MAX_SCANS} scans")
    if scans * header.width * header.height > _MAX_SCAN_PASSES * max_pixels:
        raise TooLarge(f"{scans} scans over {header.width}×{header.height} pixels")


def _dct_factor(height: int, width: int, orientation: int, enough: Preprocessing) -> int:
    """Return the factor by which a JPEG may be decoded smaller: 8, 4, 2 or 1."""
    most = shrink(height, width, enough)
    for factor in (8, 4, 2):
        # A last pixel that is filled up must stay the last: no turning.
        whole = height % factor == 0 and width % factor == 0
        if factor <= most and (whole or orientation == 1):
            return factor
    return 1


def _fast_jpeg(
    data: bytes, header: JpegHeader, factor: int
) -> tuple[NDArray[np.uint8] | None, list[str]]:
    """Return Pillow's pixels in two thirds of its time; None and the warnings if libjpeg warns."""
    sides = -(-header.height // factor), -(-header.width // factor)
    smaller = {} if factor == 1 else {"min_height": sides[0], "min_width": sides[1]}
    space = "CMYK" if header.components == 4 else "RGB"
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, space, strict=True, **smaller)
    except ValueError as exc:
        return None, [_remark(str(exc))]  # Pillow decides whether the remark is fatal
    return (pixels if pixels.shape[:2] == sides else None), []


def _remark(text: str) -> str:
    """Return libjpeg's remark on a damaged file as a warning."""
    text = " ".join(text.split())[:200]
    premature = "premature end" in text.lower()
    return f"{'premature end' if premature else 'corrupt data'}: {text}"

"""Pages and animation frames beyond the first: how many there are, and the pixels of each.

TIFF pages, GIF, WebP and APNG animations, AVIF and HEIF sequences, MPO and DICOM frames. Of the
others, JPEG XL among them, only the first frame is read.
"""

from __future__ import annotations

import io
import struct
import threading
from dataclasses import dataclass
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin

from storage.errors import Undecodable, Unsupported
from storage.shards.frames import Frames
from workers.images.extra_formats import (
    decode_dicom_frame,
    decode_heif_frame,
    dicom_frames,
    heif_frames,
)
from workers.images.jpeg import JpegHeader, read_jpeg_header
from workers.images.pillow_formats import open_with_pillow, orientation_of, to_rgb
from workers.images.pixels import (
    DecodedImage,
    check_pixels,
    check_room,
    silence_pillow,
    upright,
    whole_image,
)
from workers.images.png import read_png
from workers.images.preprocessing import ValueRange
from workers.images.signatures import format_of, webp_size
from workers.images.tiff.decode import decode_tiff
from workers.images.tiff.directories import alone, is_camera_raw, read_pages

_HEAD_NBYTES = 1 << 18  # in which a JPEG or PNG says that there is more than one picture
_KEPT_NBYTES = 64 << 20  # of a file that stays open for its next frame
# CIPA DC-007, MP type codes of pictures of their own; some writers state none. Others are
# thumbnails.
_PICTURES = ("Multi-Frame Image (Panorama)", "Multi-Frame Image (Disparity)",
             "Multi-Frame Image (Multi-Angle)")  # fmt: skip
# Brightness factors of HDR displays: Adobe and Google, Apple, ISO 21496-1.
_GAIN_MAPS = (b"hdrgm:", b"HDRGainMap", b"urn:iso:std:iso:ts:21496")


def frames_of(most: int, max_pixels: int) -> Frames:
    """Return how a run reads files of several frames.

    Args:
        most: frames of one file that are labelled.
        max_pixels: files of larger frames are not opened to count them.
    """
    return Frames(lambda data: count_frames(data, max_pixels), most)


def count_frames(data: bytes, max_pixels: int) -> int:
    """Return how many frames a file has, without decoding one; 1 where it does not say.

    Raises:
        MemoryError: this process is short of memory, which says nothing about the file.
    """
    try:
        return max(1, _count(data, max_pixels))
    except Exception:  # noqa: BLE001 - damaged or foreign: the first frame's row says how
        check_room(_KEPT_NBYTES)
        return 1


def _count(data: bytes, max_pixels: int) -> int:
    kind = format_of(data)
    if kind == "TIFF":
        pages = read_pages(data)
        return 1 if pages is None or is_camera_raw(data, pages) else pages.frames
    if kind == "JPEG":
        return mpo_frames(data)
    if kind == "PNG":
        is_animated = data.find(b"acTL", 0, _HEAD_NBYTES) >= 0
        return read_png(data, max_pixels).frames if is_animated else 1
    if kind == "GIF":
        return _gif_frames(data)
    if kind == "WebP":
        return _webp_frames(data)
    if kind == "AVIF":
        image = open_with_pillow(kind, data)
        check_pixels(*image.size, max_pixels)
        return int(getattr(image, "n_frames", 1))
    if kind == "HEIF":
        return heif_frames(data)
    return dicom_frames(data) if kind == "DICOM" else 1


def decode_frame(
    kind: str, data: bytes, number: int, max_pixels: int, value_range: ValueRange
) -> DecodedImage:
    """Decode frame 2, 3, … of a file that is no JPEG; for those see ``jpeg_frame``.

    Raises:
        Undecodable: there is no such frame, or it is damaged.
        ImageError: as ``decode``; or whatever the decoders raise.
    """
    if kind == "TIFF":
        pages = read_pages(data, frame=number)
        if pages is None or number > pages.frames:
            raise Undecodable(f"damaged TIFF: no page {number}")
        return decode_tiff(*alone(data, pages), max_pixels, value_range)
    if kind == "HEIF":
        return decode_heif_frame(data, number - 1, max_pixels)
    if kind == "DICOM":
        return decode_dicom_frame(data, number - 1, max_pixels, value_range)
    if kind not in ("GIF", "WebP", "AVIF", "PNG"):
        raise Unsupported(f"frame {number} of a {kind}")
    return _of_a_sequence(kind, data, number, max_pixels, value_range)


def mpo_frames(data: bytes) -> int:
    """Return how many pictures a JPEG has; 1 where what it says of others is damaged."""
    try:
        return 1 + len(_mpo_pictures(data))
    except Exception:  # noqa: BLE001 - Pillow on hostile bytes; the first picture is not concerned
        return 1


def jpeg_frame(data: bytes, number: int) -> bytes:
    """Return the JPEG that is picture 2, 3, … of an MPO. Raises Undecodable: there is none."""
    pictures = _mpo_pictures(data)
    if number > 1 + len(pictures):
        raise Undecodable(f"damaged MPO: no picture {number}")
    start, nbytes = pictures[number - 2]
    return data[start : start + nbytes]


@dataclass(slots=True)
class _Open:
    """The file whose frames a thread reads one after the other: each builds on those before."""

    data: bytes
    image: Image.Image


_open_here = threading.local()


def _of_a_sequence(
    kind: str, data: bytes, number: int, max_pixels: int, value_range: ValueRange
) -> DecodedImage:
    kept: _Open | None = getattr(_open_here, "file", None)
    _open_here.file = None  # after an error it is not trusted any more
    if kept is None or kept.data != data:
        kept = _Open(data, _opened(kind, data, max_pixels))
    image = kept.image
    frames = int(getattr(image, "n_frames", 1))
    if number > frames:
        raise Undecodable(f"damaged {kind}: no frame {number}")
    image.seek(number - 1)
    check_pixels(*image.size, max_pixels)
    image.load()
    warnings: list[str] = []
    pixels = to_rgb(image.copy(), value_range, 16, warnings)
    orientation = orientation_of(image)
    if len(data) <= _KEPT_NBYTES and not _reverts(image):
        _open_here.file = kept
    return whole_image(upright(pixels, orientation), orientation, frames, warnings)


def _reverts(image: Image.Image) -> bool:
    """Return whether an APNG goes back to the picture before this frame, once it was shown.

    Pillow (13.0) goes back to this frame instead where it was loaded, and is right where it was
    only passed on the way to another: the file is opened again for the next one.
    """
    return getattr(image, "dispose_op", None) == PngImagePlugin.Disposal.OP_PREVIOUS


def _opened(kind: str, data: bytes, max_pixels: int) -> Image.Image:
    if kind == "PNG":
        read_png(data, max_pixels)
        silence_pillow()
        return PngImagePlugin.PngImageFile(io.BytesIO(data))
    if kind == "WebP" and (size := webp_size(data)) is not None:
        check_pixels(*size, max_pixels)  # its plugin allocates the canvas on opening
    image = open_with_pillow(kind, data)
    check_pixels(*image.size, max_pixels)
    return image


def _mpo_pictures(data: bytes) -> list[tuple[int, int]]:
    """Return (offset, length) of the pictures of an MPO beyond the first."""
    header = read_jpeg_header(data)
    if header is not None and not header.is_mpo:
        return []
    image: Any = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    entries = image._getmp()[0xB002]  # the plugin's own reader, as MpoImagePlugin uses it
    found: list[tuple[int, int]] = []
    end = 0
    for entry in entries[1:]:
        start, nbytes = entry["DataOffset"] + image.info["mpoffset"], entry["Size"]
        if start < end:
            continue  # within another: thousands of such entries would each be looked through
        kind, picture = entry["Attribute"]["MPType"], data[start : start + nbytes]
        end = start + nbytes
        if kind in _PICTURES or (kind == "Undefined" and _is_like_the_first(header, picture)):
            found.append((start, nbytes))
    return found


def _is_like_the_first(first: JpegHeader | None, picture: bytes) -> bool:
    """Return whether a picture of no stated kind is of the first one's size, and no gain map."""
    other = read_jpeg_header(picture)
    if first is None or other is None or any(mark in picture for mark in _GAIN_MAPS):
        return False
    return (first.width, first.height) == (other.width, other.height)


def _gif_frames(data: bytes) -> int:
    """Count image descriptors."""
    at, frames = 13 + _table_nbytes(data[10]), 0
    while at < len(data):
        block = data[at]
        if block == 0x2C and at + 10 < len(data):
            frames += 1
            at = _behind_blocks(data, at + 11 + _table_nbytes(data[at + 9]))
        elif block == 0x21:
            at = _behind_blocks(data, at + 2)
        else:
            break
    return frames


def _table_nbytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def _webp_frames(data: bytes) -> int:
    at, frames = 12, 0
    while at + 8 <= len(data):
        (nbytes,) = struct.unpack_from("<I", data, at + 4)
        frames += data[at : at + 4] == b"ANMF"
        at += 8 + nbytes + nbytes % 2
    return frames

"""Decode: the bytes of an image file to upright RGB pixels, or an error that becomes its row.

The oracle is Pillow, since super-gradients' ``predict()`` reads files with it: same pixels to
the bit, alpha dropped, palettes and CMYK converted its way. On top of ``predict()``, the EXIF
orientation is applied, and 16-bit samples are scaled to 8 bits instead of clipped. PNG and TIFF are
read by libvips, with the same pixels: Pillow overlooks damage in the one, and reads several kinds
of the other wrongly. Where the network sees a JPEG at half its
size or less, ``model.decode: fast`` lets libjpeg leave out the frequencies that would be lost
anyway (see ``decode``); those pixels are not ``predict()``'s, which skips rows and columns instead.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from storage.errors import ImageError, TooLarge, Undecodable, Unsupported
from storage.shards.frames import split_frame
from workers.images.extra_formats import decode_extra, probe_extra
from workers.images.frames import decode_frame, jpeg_frame, mpo_frames
from workers.images.jpeg import decode_jpeg, read_jpeg_header
from workers.images.pillow_formats import (
    decode_with_pillow,
    jpeg_pixels,
    open_with_pillow,
    orientation_of,
)
from workers.images.pixels import (
    DecodedImage,
)
from workers.images.png import decode_png, png_size
from workers.images.preprocessing import Preprocessing, ValueRange
from workers.images.signatures import (
    describe_foreign,
    format_of,
    webp_exif,
    webp_size,
)
from workers.images.tiff.decode import decode_tiff
from workers.images.tiff.directories import exif_orientation, is_camera_raw, read_pages

# What a decoder needs besides the pixels, generously; and the most pixels that are asked for.
_ROOM_NBYTES, _MOST_ASKED = 32 * 1024 * 1024, 1 << 28
_EXTRA = ("HEIF", "JPEG XL", "DICOM", "camera RAW")


def decode(
    data: bytes,
    *,
    max_pixels: int,
    enough: Preprocessing | None = None,
    value_range: ValueRange = "full",
) -> DecodedImage:
    """Decode one image file, whatever its name says; of several frames or pages the first, unless
    ``data`` stands for another (``storage.shards.frames``).

    JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, JPEG 2000, PNM, Photoshop (its composite) and TGA of any
    colour model that has an agreed RGB; HEIF, JPEG XL, DICOM and camera RAW where their extras are
    installed. Alpha is dropped, not composited.

    Args:
        max_pixels: the largest image that is decoded, by its header.
        enough: what the network will see. A JPEG that its letterbox shrinks by 2, 4 or 8 or more
            is decoded at a half, a quarter or an eighth (libjpeg's scaled inverse DCT), never
            smaller than it is needed. None: always whole.
        value_range: what becomes black and white where samples have more than 8 bits.

    Raises:
        TooLarge: the header announces more than ``max_pixels``; no pixel memory was spent.
        Unsupported: another format, or samples that have no agreed 8-bit meaning (32-bit
            integers, floats, CIELAB).
        Undecodable: empty, truncated, damaged, or no image at all.
        MemoryError: this process is short of memory, which says nothing about the image.
    """
    if not data:
        raise Undecodable("empty: 0 bytes")
    data, number = split_frame(data)
    kind = format_of(data)
    if kind is None:
        foreign, what = describe_foreign(data)
        raise (Unsupported if foreign else Undecodable)(what)
    try:
        if kind == "JPEG":
            return _decode_jpeg(data, number, max_pixels, enough)
        if number > 1:
            return decode_frame(kind, data, number, max_pixels, value_range)
        return _decode_first(kind, data, max_pixels, value_range)
    except ImageError as exc:
        if exc.__cause__ is not None and not isinstance(exc, TooLarge):
            _check_memory(data)  # it is a library that said so
        raise
    except MemoryError as exc:
        _check_memory(data)
        raise TooLarge(f"not enough memory to decode this {kind}") from exc
    except Image.DecompressionBombError as exc:  # a frame larger than the canvas that it said
        raise TooLarge(f"{kind}: {_reason(exc)}") from exc
    except Exception as exc:  # a decoder fed hostile bytes raises what it likes
        _check_memory(data)
        raise Undecodable(f"damaged {kind}: {_reason(exc)}") from exc


def _decode_jpeg(
    data: bytes, number: int, max_pixels: int, enough: Preprocessing | None
) -> DecodedImage:
    """Decode a JPEG, or a further picture of an MPO."""
    jpeg = data if number == 1 else jpeg_frame(data, number)
    header = read_jpeg_header(jpeg)
    if header is None:
        raise Undecodable("damaged JPEG: no frame header")
    image = decode_jpeg(jpeg, header, max_pixels, enough, _jpeg_orientation, jpeg_pixels)
    if number == 1 and not header.is_mpo:
        return image
    return image._replace(frames=mpo_frames(data))


def _decode_first(kind: str, data: bytes, max_pixels: int, value_range: ValueRange) -> DecodedImage:
    """Decode the first frame of a file that is no JPEG."""
    if kind == "TIFF":
        pages = read_pages(data)
        if not is_camera_raw(data, pages):
            return decode_tiff(data, pages, max_pixels, value_range)
        kind = "camera RAW"
    if kind == "PNG":
        return decode_png(data, max_pixels, value_range, exif_orientation)
    if kind in _EXTRA:
        return decode_extra(kind, data, max_pixels, value_range)
    return decode_with_pillow(kind, data, max_pixels, value_range)


def _check_memory(data: bytes) -> None:
    """Raise MemoryError where an honest image of this size would find no room either.

    Decoders that are refused memory say so in many ways, "damaged" among them. The memory is only
    asked for, not touched.
    """
    width, height, _ = probe(data) or (0, 0, 1)
    np.empty(min(width * height, _MOST_ASKED) * 4 + _ROOM_NBYTES, np.uint8)


def probe(data: bytes) -> tuple[int, int, int] | None:
    """Return (width, height, orientation) of the upright image from its header; None if unknown.

    Both sides fit an int32.
    """
    try:
        width, height, orientation = _probe(data)
    except Exception:  # noqa: BLE001  as in decode(): the size is unknown
        return None
    sides_fit = 0 < width < 1 << 31 and 0 < height < 1 << 31
    return (width, height, orientation) if sides_fit else None


def _probe(data: bytes) -> tuple[int, int, int]:
    data, number = split_frame(data)
    kind = format_of(data)
    if kind is None:
        raise Undecodable("not an image")
    if kind == "JPEG":
        data = data if number == 1 else jpeg_frame(data, number)
        header = read_jpeg_header(data)
        if header is None:
            raise Undecodable("no frame header")
        orientation = _jpeg_orientation(data) if header.has_metadata else 1
        return _upright_size(header.width, header.height, orientation)
    if kind == "TIFF":
        pages = read_pages(data, number)
        if not is_camera_raw(data, pages):
            if pages is None:
                raise Undecodable("no image directory")
            return _upright_size(*pages.main.size, pages.main.orientation)
        kind = "camera RAW"
    if kind in _EXTRA:
        return probe_extra(kind, data, number)
    if kind == "PNG":
        return _upright_size(*png_size(data, exif_orientation))
    if kind == "WebP":  # its plugin allocates the canvas on opening
        size = webp_size(data)
        if size is None:
            raise Undecodable("no header")
        return _upright_size(*size, exif_orientation(webp_exif(data)) or 1)
    if kind == "GIF" and number > 1:
        raise Unsupported("a later frame may be larger than the first")
    image = open_with_pillow(kind, data)
    return _upright_size(*image.size, orientation_of(image))


def _upright_size(width: int, height: int, orientation: int) -> tuple[int, int, int]:
    return (height, width, orientation) if orientation >= 5 else (width, height, orientation)


def _jpeg_orientation(data: bytes) -> int:
    return orientation_of(open_with_pillow("JPEG", data))


def _reason(exc: Exception) -> str:
    text = " ".join(str(exc).split())[:200]
    return f"{text}" if text else type(exc).__name__

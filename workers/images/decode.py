"""Decode: the bytes of an image file to upright RGB pixels, or an error that becomes its row.

The oracle is Pillow, since super-gradients' ``predict()`` reads files with it: same pixels to
the bit, alpha dropped, palettes and CMYK converted its way. On top of ``predict()``, the EXIF
orientation is applied, and 16-bit grey is scaled to 8 bits instead of clipped. Where the network
sees a JPEG at half its size or less, libjpeg leaves out the frequencies that would be lost anyway
(see ``decode``); those pixels are not ``predict()``'s, which skips rows and columns instead.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from storage.errors import ImageError, TooLarge, Undecodable, Unsupported
from workers.images.jpeg_header import JpegHeader, count_scans, has_end, read_jpeg_header
from workers.images.letterbox import shrink
from workers.images.preprocessing import Preprocessing
from workers.images.quiet_decoders import silence
from workers.images.signatures import (
    describe_foreign,
    format_of,
    png_exif,
    png_size,
    webp_exif,
    webp_size,
    without_metadata,
)

_ORIENTATION_TAG = 0x0112
_MAX_SCAN_PASSES = 64  # a progressive JPEG may cost so many passes over max_pixels, not more
# What a decoder needs besides the pixels, generously; and the most pixels that are asked for.
_ROOM_NBYTES, _MOST_ASKED = 32 * 1024 * 1024, 1 << 28

# The plugins are called by name: Image.open would try every format it knows, and warns or
# refuses by a process-wide limit that is not ours.
_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """Pixels as a person would see them.

    Attributes:
        pixels: uint8 [H, W, 3], RGB, upright, C-contiguous; may be read-only.
        exif_orientation: 1-8, what the file said (1 where it said nothing usable); already
            applied to ``pixels``.
        size: (height, width) of the upright image; ``pixels`` may be smaller.
        factor: 1, or 2, 4, 8: so many pixels of the image, each way, make one of ``pixels``; a
            last one that is not whole was filled up.
    """

    pixels: NDArray[np.uint8]
    exif_orientation: int
    size: tuple[int, int]
    factor: int = 1


def decode(data: bytes, *, max_pixels: int, enough: Preprocessing | None = None) -> DecodedImage:
    """Decode one image file, whatever its name said; of an animation the first frame.

    JPEG, PNG, WebP, BMP, TIFF and GIF of any colour model that Pillow turns into RGB. Alpha is
    dropped, not composited. Grey of 9 to 16 bits keeps its highest 8 bits.

    Args:
        max_pixels: the largest image that is decoded, by its header.
        enough: what the network will see. A JPEG that its letterbox shrinks by 2, 4 or 8 or more
            is decoded at a half, a quarter or an eighth (libjpeg's scaled inverse DCT), never
            smaller than it is needed. None: always whole.

    Raises:
        TooLarge: the header announces more than ``max_pixels``; no pixel memory was spent.
        Unsupported: another format, or samples that have no agreed 8-bit meaning (32-bit
            integers, floats, CIELAB).
        Undecodable: empty, truncated, damaged, or no image at all.
        MemoryError: this process is short of memory, which says nothing of the image.
    """
    if not data:
        raise Undecodable("empty: 0 bytes")
    kind = format_of(data)
    if kind is None:
        foreign, what = describe_foreign(data)
        raise (Unsupported if foreign else Undecodable)(what)
    try:
        if kind == "JPEG":
            return _decode_jpeg(data, max_pixels, enough)
        return _decode_with_pillow(kind, data, max_pixels)
    except ImageError:
        raise
    except MemoryError as exc:
        _check_memory(data)
        raise TooLarge(f"not enough memory to decode this {kind}") from exc
    except Exception as exc:  # a decoder fed hostile bytes raises what it likes
        _check_memory(data)
        raise Undecodable(f"damaged {kind}: {_reason(exc)}") from exc


def _check_memory(data: bytes) -> None:
    """Raise MemoryError where an honest image of this size would find no room either.

    Decoders that are refused memory say so in many ways, "damaged" among them. The memory is only
    asked for, not touched.
    """
    width, height, _ = probe(data) or (0, 0, 1)
    np.empty(min(width * height, _MOST_ASKED) * 4 + _ROOM_NBYTES, np.uint8)


def probe(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, orientation) of the upright image, from the header alone; None if unknown.

    Both sides fit an int32.
    """
    try:
        width, height, orientation = _probe(data)
    except Exception:  # noqa: BLE001  as in decode(): there is no size to tell
        return None
    sides_fit = 0 < width < 1 << 31 and 0 < height < 1 << 31
    return (width, height, orientation) if sides_fit else None


def _probe(data: bytes) -> tuple[int, int, int]:
    kind = format_of(data)
    if kind is None:
        raise Undecodable("not an image")
    if kind == "JPEG":
        header = read_jpeg_header(data)
        if header is None:
            raise Undecodable("no frame header")
        return _upright_size(header.width, header.height, _jpeg_orientation(data, header))
    if kind in ("WebP", "PNG"):
        # Their plugins allocate the canvas on opening, or decode all pixels to look for EXIF.
        size = webp_size(data) if kind == "WebP" else png_size(data)
        if size is None:
            raise Undecodable("no header")
        exif = Image.Exif()
        exif.load(webp_exif(data) if kind == "WebP" else png_exif(data))
        return _upright_size(*size, _valid(exif.get(_ORIENTATION_TAG)))
    image = _open(kind, data)
    return _upright_size(*image.size, _orientation(image), done=kind == "TIFF")


def _upright_size(
    width: int, height: int, orientation: int, *, done: bool = False
) -> tuple[int, int, int]:
    turned = orientation >= 5 and not done
    return (height, width, orientation) if turned else (width, height, orientation)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise Undecodable(f"a size of {width}×{height} pixels")
    if width * height > max_pixels:
        raise TooLarge(
            f"{width}×{height} is {width * height} pixels; this run takes up to {max_pixels}"
        )


def _decode_jpeg(data: bytes, max_pixels: int, enough: Preprocessing | None) -> DecodedImage:
    header = read_jpeg_header(data)
    if header is None:
        raise Undecodable("damaged JPEG: no frame header")
    _check_pixels(header.width, header.height, max_pixels)
    scans = count_scans(data)
    if scans * header.width * header.height > _MAX_SCAN_PASSES * max_pixels:
        raise TooLarge(f"{scans} scans over {header.width}×{header.height} pixels")
    orientation = _jpeg_orientation(data, header)
    width, height, _ = _upright_size(header.width, header.height, orientation)
    factor = 1 if enough is None else _dct_factor(height, width, orientation, enough)
    pixels = _fast_jpeg(data, header, factor) if header.components in (1, 3) else None
    if pixels is None:
        if not has_end(data):  # Pillow sometimes lets the last bytes go, sometimes not
            raise Undecodable("truncated JPEG: it ends without its end marker")
        return _decode_with_pillow("JPEG", data, max_pixels)
    return DecodedImage(_upright(pixels, orientation), orientation, (height, width), factor)


def _dct_factor(height: int, width: int, orientation: int, enough: Preprocessing) -> int:
    """How much smaller a JPEG may be decoded: 8, 4, 2, or 1: not at all."""
    most = shrink(height, width, enough)
    for factor in (8, 4, 2):
        # A last pixel that is filled up must stay the last: no turning.
        whole = height % factor == 0 and width % factor == 0
        if factor <= most and (whole or orientation == 1):
            return factor
    return 1


def _fast_jpeg(data: bytes, header: JpegHeader, factor: int) -> NDArray[np.uint8] | None:
    """Pillow's pixels in two thirds of its time; None where libjpeg had anything to remark."""
    try:
        if factor == 1:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", strict=True)
            return pixels
        sides = -(-header.height // factor), -(-header.width // factor)
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=sides[0], min_width=sides[1], strict=True
        )
    except ValueError:
        return None  # Pillow decides whether the remark is fatal
    return pixels if pixels.shape[:2] == sides else None


def _jpeg_orientation(data: bytes, header: JpegHeader) -> int:
    return _orientation(_open("JPEG", data)) if header.has_metadata else 1


def _decode_with_pillow(kind: str, data: bytes, max_pixels: int) -> DecodedImage:
    if kind == "WebP" and (size := webp_size(data)) is not None:
        _check_pixels(*size, max_pixels)  # its plugin allocates the canvas on opening
    image = _open(kind, data)
    _check_pixels(*image.size, max_pixels)
    _check_tiles(image, max_pixels)
    orientation = _orientation(image)
    bits = _bits_per_sample(image)
    image.load()
    pixels = _to_rgb(image, bits)
    if kind != "TIFF":  # Pillow has turned a TIFF already
        pixels = _upright(pixels, orientation)
    return DecodedImage(pixels, orientation, (pixels.shape[0], pixels.shape[1]))


def _open(kind: str, data: bytes) -> Image.Image:
    silence()
    try:
        return _OPENERS[kind](io.BytesIO(data))
    except ValueError:
        if kind != "PNG":
            raise
        # Oversized text or colour profiles: the pixels do not depend on them.
        return _OPENERS[kind](io.BytesIO(without_metadata(data)))


def _orientation(image: Image.Image) -> int:
    try:
        return _valid(image.getexif().get(_ORIENTATION_TAG))
    except Exception:  # noqa: BLE001  damaged EXIF: the pixels are fine, their turn is unknown
        return 1


def _valid(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """A TIFF's tile is decoded whole, however small the image that it is cut from."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))
        if isinstance(width, int) and isinstance(height, int) and width and height:
            _check_pixels(width, height, max_pixels)


def _bits_per_sample(image: Image.Image) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(258, (8,))
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 16


def _to_rgb(image: Image.Image, bits: int) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> max(0, bits - 8)).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(grey[..., None], (*grey.shape, 3)))
    if image.mode in ("I", "F", "LAB"):
        raise Unsupported(f"samples of mode {image.mode!r} have no agreed 8-bit meaning")
    image.info.pop("transparency", None)  # dropped like alpha; convert() would remark on it
    return np.ascontiguousarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo the EXIF orientation (JEITA CP-3451, tag 0x0112); [H, W, 3] or [W, H, 3]."""
    turned: Any = pixels
    if orientation in (5, 6, 7, 8):
        turned = cv2.transpose(turned)
    if orientation in (2, 3, 6, 7):
        turned = cv2.flip(turned, 1)
    if orientation in (3, 4, 7, 8):
        turned = cv2.flip(turned, 0)
    return np.ascontiguousarray(turned)


def _reason(exc: Exception) -> str:
    text = " ".join(str(exc).split())[:200]
    return f"{text}" if text else type(exc).__name__

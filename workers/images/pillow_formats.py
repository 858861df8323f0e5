"""The formats that Pillow decodes: opened by their plugin, loaded first, then asked for the rest.

The order matters: plugins that decode the pixels when they are asked for EXIF would let damaged
pixels pass for damaged EXIF.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PpmImagePlugin,
    PsdImagePlugin,
    TgaImagePlugin,
    WebPImagePlugin,
)

from storage.errors import Undecodable, Unsupported
from workers.images.pixels import (
    ORIENTATION_TAG,
    DecodedImage,
    as_rgb,
    check_pixels,
    profile_warning,
    silence_pillow,
    to_8_bits,
    upright,
    valid_orientation,
    whole_image,
)
from workers.images.preprocessing import ValueRange
from workers.images.signatures import (
    bmp_masks,
    bmp_warnings,
    bytes_after_end,
    check_psd,
    gif_warnings,
    webp_size,
)
from workers.images.tiff.directories import exif_orientation

# The plugins are called by name: Image.open would try every format it knows, and warns or
# refuses by a process-wide limit that is not ours.
_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PNM": PpmImagePlugin.PpmImageFile,
    "Photoshop": PsdImagePlugin.PsdImageFile,
    "TGA": TgaImagePlugin.TgaImageFile,
}


_WARN: dict[str, Callable[[bytes], list[str]]] = {"BMP": bmp_warnings, "GIF": gif_warnings}


def open_with_pillow(kind: str, data: bytes) -> Image.Image:
    """Open without decoding."""
    silence_pillow()
    return _OPENERS[kind](io.BytesIO(data))


def decode_with_pillow(
    kind: str, data: bytes, max_pixels: int, value_range: ValueRange = "full"
) -> DecodedImage:
    """Decode the first frame. Raises as ``decode``, or whatever Pillow raises."""
    if kind == "WebP" and (size := webp_size(data)) is not None:
        check_pixels(*size, max_pixels)  # its plugin allocates the canvas on opening
    if kind == "Photoshop":
        check_psd(data)
    if kind == "BMP" and (masks := bmp_masks(data)) is not None:
        return _decode_masked_bmp(data, masks, max_pixels)
    warnings = _WARN[kind](data) if kind in _WARN else []
    image = open_with_pillow(kind, data)
    check_pixels(*image.size, max_pixels)
    image.load()
    frames = int(getattr(image, "n_frames", 1)) if kind != "Photoshop" else 1
    pixels = _rgb(kind, image, value_range, warnings)
    orientation = orientation_of(image)
    pixels = upright(pixels, orientation)
    if behind := bytes_after_end(kind, data):
        warnings.append(f"trailing bytes: {behind} after the image's end")
    warnings += profile_warning(image.info.get("icc_profile"))
    return whole_image(pixels, orientation, frames, warnings)


def jpeg_pixels(data: bytes) -> NDArray[np.uint8]:
    """Return a JPEG's pixels as Pillow has them, not turned."""
    image = open_with_pillow("JPEG", data)
    image.load()
    return to_rgb(image, "full", 8, [])


def orientation_of(image: Image.Image) -> int:
    """Return the orientation of an image whose pixels are loaded, or cannot be at fault.

    EXIF is read here, since Pillow gives it up at its first damaged entry; Pillow adds what XMP
    says.
    """
    if (said := exif_orientation(image.info.get("exif", b""))) is not None:
        return said
    try:
        return valid_orientation(image.getexif().get(ORIENTATION_TAG))
    except Exception:  # noqa: BLE001  damaged EXIF: the pixels are fine, their turn is unknown
        return 1


def _rgb(
    kind: str, image: Image.Image, value_range: ValueRange, warnings: list[str]
) -> NDArray[np.uint8]:
    if kind == "PNM" and image.mode == "I":  # Pillow scales the file's range to 16 bits
        grey = to_8_bits(np.asarray(image), value_range, bits=16, warnings=warnings)
        return as_rgb(grey)
    return to_rgb(image, value_range, 16, warnings)


def to_rgb(
    image: Image.Image, value_range: ValueRange, bits: int, warnings: list[str]
) -> NDArray[np.uint8]:
    """Return the pixels of a loaded image as RGB, as stored; alpha is dropped.

    Args:
        bits: of the samples of a 16-bit mode.
        warnings: gets a remark on samples that use little of their range.

    Raises:
        Unsupported: samples that have no agreed 8-bit meaning.
    """
    if image.mode.startswith("I;16"):
        return as_rgb(to_8_bits(np.asarray(image), value_range, bits=bits, warnings=warnings))
    if image.mode in ("I", "F"):
        return as_rgb(to_8_bits(np.asarray(image), value_range, bits=None, warnings=warnings))
    if image.mode == "LAB":
        raise Unsupported("samples of mode 'LAB' have no agreed 8-bit meaning")
    image.info.pop("transparency", None)  # dropped like alpha; convert() would remark on it
    return np.ascontiguousarray(image if image.mode == "RGB" else image.convert("RGB"))


def _decode_masked_bmp(data: bytes, masks: tuple[int, ...], max_pixels: int) -> DecodedImage:
    """Decode a BMP whose channels lie in bit masks that Pillow does not know."""
    width = int.from_bytes(data[18:22], "little", signed=True)
    height = int.from_bytes(data[22:26], "little", signed=True)
    bits = int.from_bytes(data[28:30], "little")
    check_pixels(width, abs(height), max_pixels)
    start = int.from_bytes(data[10:14], "little")
    stride = (width * bits + 31) // 32 * 4
    rows = np.frombuffer(data[start : start + stride * abs(height)], np.uint8)
    if rows.size < stride * abs(height):
        raise Undecodable(f"truncated BMP: {rows.size} of {stride * abs(height)} bytes of pixels")
    dtype = "<u2" if bits == 16 else "<u4"
    values = rows.reshape(abs(height), stride).view(dtype)[:, :width].astype(np.uint32)
    pixels = np.stack(list(_unmasked(values, masks[:3])), axis=-1)
    return whole_image(pixels if height < 0 else pixels[::-1], 1, 1, [])


def _unmasked(values: NDArray[np.uint32], masks: Iterable[int]) -> Iterable[NDArray[np.uint8]]:
    for mask in masks:
        low = (mask & -mask).bit_length() - 1 if mask else 0
        most = mask >> low
        channel = ((values & np.uint32(mask)) >> np.uint32(low)).astype(np.float64)
        yield (channel * (255 / most if most else 0) + 0.5).astype(np.uint8)

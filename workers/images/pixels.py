"""What the decoders share: quiet libraries, the result, limits, orientation, samples to 8 bits."""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import tempfile
import warnings as python_warnings
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray

from storage.errors import TooLarge, Undecodable, Unsupported
from workers.images.preprocessing import ValueRange

ORIENTATION_TAG = 0x0112
_NARROW = 1 / 4  # of the range; an image that uses less is nearly flat in 8 bits
_VIPS_TYPES = {
    "uchar": np.uint8, "char": np.int8, "ushort": np.uint16, "short": np.int16,
    "uint": np.uint32, "int": np.int32, "float": np.float32, "double": np.float64,
}  # fmt: skip
_SRGB_NAMES = ("srgb", "c2")  # c2: the tiny sRGB profile that several sites embed


@functools.cache
def silence_pillow() -> None:
    """Keep the warnings of Pillow and libtiff about damaged files out of this process's logs.

    The remark that matters is in the row's ``error``; these would reach the terminal without the
    name of the image.
    """
    python_warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # Pillow leaves libtiff's default handler, which prints to stderr, in place. Its wheels bring
    # the library beside the package; where it lies elsewhere, the lines are printed after all.
    for library in (Path(PIL.__file__).parent.parent / "pillow.libs").glob("libtiff*.so*"):
        ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


@functools.cache
def libvips() -> Any:
    """Return pyvips, with one thread an image: the decode threads are the parallelism."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    os.environ.setdefault("VIPS_WARNING", "0")
    import pyvips

    logging.getLogger("pyvips").setLevel(logging.CRITICAL)
    pyvips.cache_set_max(0)
    return pyvips


def check_room(nbytes: int) -> None:
    """Raise MemoryError where this process cannot have ``nbytes`` more, which are not touched.

    GLib, which libvips allocates with, ends the process instead.
    """
    np.empty(nbytes, np.uint8)


def first_bands(image: Any, most: int) -> Any:
    """Return a libvips image of its first channels; of one channel where it has fewer."""
    return image.extract_band(0, n=most if image.bands >= most else 1)


def vips_samples(image: Any, most: int | None = None) -> NDArray[Any]:
    """Return a libvips image as [H, W, channels], also where ``numpy()`` would drop an axis.

    Args:
        most: take only this many channels, the first ones; one where it has fewer.

    Raises:
        pyvips.Error: the pixels cannot be decoded.
        Unsupported: complex samples.
    """
    dtype = _VIPS_TYPES.get(image.format)
    if dtype is None:
        raise Unsupported(f"samples of libvips' format {image.format}")
    if most is not None:  # before its samples are written: there may be thousands
        image = first_bands(image, most)
    check_room(3 * image.width * image.height * image.bands * np.dtype(dtype).itemsize)
    samples: NDArray[Any] = np.frombuffer(image.write_to_memory(), dtype)
    return samples.reshape(image.height, image.width, image.bands)


def on_disk(height: int, width: int) -> NDArray[np.uint8] | None:
    """Return an array [height, width, 3] in a file without a name; None if the disk is full.

    The room is taken at once: a mapped file that runs out of disk later would end the process.
    """
    with tempfile.TemporaryFile(prefix="labelfleet-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, height * width * 3)
        except OSError:
            return None
        return np.memmap(file, np.uint8, "r+", shape=(height, width, 3))


def lies_on_disk(pixels: NDArray[np.uint8]) -> mmap.mmap | None:
    """Return the mapped file that holds the pixels; None for those in memory."""
    at: Any = pixels.base  # None of most: they have memory of their own
    while isinstance(at, np.ndarray):
        at = at.base
    return at if isinstance(at, mmap.mmap) else None


def let_go(pixels: NDArray[np.uint8]) -> None:
    """Give back the memory of pixels that lie on disk; others stay as they are."""
    if (mapped := lies_on_disk(pixels)) is not None:
        mapped.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: the file keeps what was written


def in_memory(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a part of a picture in memory; one that lies on disk is copied a few rows at a time.

    A row that is touched brings in up to 64 KiB of its neighbourhood: 41 MB for the 640 rows of a
    tile, if the system has them in its cache.
    """
    if lies_on_disk(pixels) is None:
        return pixels
    copy = np.empty_like(pixels, subok=False)
    for top in range(0, len(pixels), _BAND_ROWS):
        copy[top : top + _BAND_ROWS] = pixels[top : top + _BAND_ROWS]
        let_go(pixels)
    return copy


_BAND_ROWS = 32


def shrunk_from_disk(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize with ``cv2.resize``'s bilinear rule, a few rows in memory; within 1 of its values."""
    out = np.empty((height, width, 3), np.uint8)
    last = pixels.shape[0] - 1
    at = np.clip((np.arange(height) + 0.5) * (pixels.shape[0] / height) - 0.5, 0, last)
    for row, place in enumerate(at):
        upper = int(place)
        pair = np.asarray(pixels[upper : min(upper, last - 1) + 2], np.float32)
        share = place - upper
        mixed = pair[0] * (1 - share) + pair[-1] * share
        out[row] = np.rint(cv2.resize(mixed[None].astype(np.float32), (width, 1))[0])
        let_go(pixels)  # at once: a page that is read brings its neighbours in
    return out


class DecodedImage(NamedTuple):
    """Pixels as a person would see them.

    Attributes:
        pixels: uint8 [H, W, 3], RGB, upright, C-contiguous; may be read-only. Of a very large
            image they may lie on disk: ``let_go`` them after use.
        exif_orientation: 1-8, what the file said (1 where it said nothing usable); already
            applied to ``pixels``.
        size: (height, width) of the upright image; ``pixels`` may be smaller.
        factor: 1, 2, 4 or 8: how many pixels of the image, each way, make one of ``pixels``; a
            last one that is not whole was filled up.
        frames: pages or animation frames in the file.
        warning: kinds and details as in ``AnnotationRow.warning``; None: no anomalies.
    """

    pixels: NDArray[np.uint8]
    exif_orientation: int
    size: tuple[int, int]
    factor: int = 1
    frames: int = 1
    warning: str | None = None


def whole_image(
    pixels: NDArray[np.uint8], orientation: int, frames: int, warnings: list[str]
) -> DecodedImage:
    """Return the result for upright pixels of full size."""
    size = (pixels.shape[0], pixels.shape[1])
    return DecodedImage(
        np.ascontiguousarray(pixels), orientation, size, 1, frames, joined(warnings)
    )


def joined(warnings: list[str]) -> str | None:
    """Return warnings as one text, each kind once; None for none."""
    if not warnings:
        return None
    by_kind: dict[str, str] = {}
    for warning in warnings:
        clean = warning.replace(";", ",")
        by_kind.setdefault(clean.split(":", 1)[0], clean)
    return "; ".join(by_kind.values())


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise TooLarge above ``max_pixels``, Undecodable for an empty image."""
    if width <= 0 or height <= 0:
        raise Undecodable(f"a size of {width}×{height} pixels")
    if width * height > max_pixels:
        raise TooLarge(
            f"{width}×{height} is {width * height} pixels; this run takes up to {max_pixels}"
        )


def valid_orientation(value: Any) -> int:
    """Return a valid EXIF orientation, 1 for anything else."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo the EXIF orientation (JEITA CP-3451, tag 0x0112); [H, W, 3] or [W, H, 3]."""
    if orientation == 1:
        return np.ascontiguousarray(pixels)
    turned: Any = pixels
    if orientation in (5, 6, 7, 8):
        turned = cv2.transpose(turned)
    if orientation in (2, 3, 6, 7):
        turned = cv2.flip(turned, 1)
    if orientation in (3, 4, 7, 8):
        turned = cv2.flip(turned, 0)
    return np.ascontiguousarray(turned)


def as_rgb(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return [H, W], [H, W, 1 or 2] (grey, alpha) or [H, W, 3 or more] as RGB; alpha is dropped."""
    if values.ndim == 2:
        values = values[..., None]
    if values.shape[2] < 3:
        return np.ascontiguousarray(np.broadcast_to(values[..., :1], (*values.shape[:2], 3)))
    return np.ascontiguousarray(values[..., :3])


def to_8_bits(
    values: NDArray[Any], value_range: ValueRange, *, bits: int | None, warnings: list[str]
) -> NDArray[np.uint8]:
    """Return samples of more than 8 bits as uint8.

    Args:
        values: integers or floats, any shape.
        value_range: ``full`` keeps the highest 8 bits, without rounding.
        bits: the samples' own range is 0 to 2^bits - 1; None: they have none (floats, 32-bit
            integers, signed values).
        warnings: a narrow range is added.

    Raises:
        Unsupported: ``full`` of samples without a range of their own.
    """
    low, high = (float(v) for v in _extent(values))
    if bits is not None and high - low < _NARROW * (2**bits - 1):
        warnings.append(
            f"narrow range: values from {low:g} to {high:g} of 0 to {2**bits - 1} "
            f"(model.range: {value_range if isinstance(value_range, str) else list(value_range)})"
        )
    if value_range == "full":
        if bits is None:
            raise Unsupported(
                f"samples of type {values.dtype} have no agreed 8-bit meaning; "
                "model.range (data, or [lo, hi]) gives them one"
            )
        return (values >> max(0, bits - 8)).astype(np.uint8)
    if value_range != "data":
        low, high = value_range
    scaled = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
    return np.clip(np.nan_to_num(scaled) + 0.5, 0, 255).astype(np.uint8)


def _extent(values: NDArray[Any]) -> tuple[Any, Any]:
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (values.min(), values.max()) if values.size else (0, 0)


def profile_warning(profile: bytes | None) -> list[str]:
    """Return the warning for an ICC profile that is not applied; none for sRGB's."""
    if not profile:
        return []
    name = _profile_name(profile)
    if name.lower().startswith(_SRGB_NAMES) or "srgb" in name.lower():
        return []
    return [f"ignored colour profile: {name or 'without a name'}"]


def _profile_name(profile: bytes) -> str:
    """Return the profile's description tag (ICC.1:2010, 9.2.41), as far as it is there."""
    count = int.from_bytes(profile[128:132], "big")
    for at in range(132, 132 + 12 * min(count, 100), 12):
        if profile[at : at + 4] != b"desc":
            continue
        start = int.from_bytes(profile[at + 4 : at + 8], "big")
        tag = profile[start : start + int.from_bytes(profile[at + 8 : at + 12], "big")]
        if tag[:4] == b"desc":
            text = tag[12 : 12 + int.from_bytes(tag[8:12], "big")].decode("latin-1")
        else:  # multi-localised: the first of its records
            begin, length = int.from_bytes(tag[24:28], "big"), int.from_bytes(tag[20:24], "big")
            text = tag[begin : begin + length].decode("utf-16-be", "replace")
        return "".join(c for c in text if c.isprintable())[:60].strip()
    return ""

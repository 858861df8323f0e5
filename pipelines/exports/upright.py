"""Rewrite images that some readers would not show as they were labelled.

Boxes are in pixels of the upright image. Readers that ignore the EXIF orientation, among them
OpenCV with some flags, torchvision and many loaders, would show them elsewhere; HEIC, JPEG 2000,
AVIF and others they would not show at all.
"""

from __future__ import annotations

import cv2

from storage.errors import StorageError
from storage.shards.frames import is_numbered
from workers.images.decode import decode, probe
from workers.images.preprocessing import ValueRange
from workers.images.signatures import format_of

_MAX_PIXELS = 1 << 29
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]  # 4:4:4
_ENCODERS = {"JPEG": (".jpg", _JPEG), "WebP": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101])}
_RARE = ("HEIF", "AVIF", "JPEG 2000", "JPEG XL", "DICOM", "camera RAW", "Photoshop")
_RARE_SUFFIXES = (
    ".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".jxl", ".dcm",
    ".dicom", ".psd", ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf",
    ".pef", ".srw",
)  # fmt: skip


def copied_name(image_id: str, *, framed: bool = False) -> str:
    """Return the id with ``.png`` behind it, where the image becomes PNG.

    Args:
        framed: further frames of files are images of their own.
    """
    if framed and is_numbered(image_id):
        return f"{image_id}.png"
    stem = image_id.rsplit("#", 1)[0]  # the second member of one name
    return f"{image_id}.png" if stem.lower().endswith(_RARE_SUFFIXES) else image_id


def upright(raw: bytes, value_range: ValueRange = "full", *, as_png: bool = False) -> bytes | None:
    """Return the image upright, without its metadata, in a format that every reader knows.

    JPEGs are encoded again at quality 95, everything else without loss; formats other than JPEG
    and WebP become PNG. None: it is upright and in such a format already.

    Args:
        value_range: as in the run, for samples of more than 8 bits.
        as_png: whatever it is, as for a frame of a file.

    Raises:
        ImageError: it is to be converted and cannot be decoded.
        StorageError: it cannot be encoded.
    """
    kind = format_of(raw) or ""
    size = probe(raw)
    if not as_png and kind not in _RARE and (size is None or size[2] == 1):
        return None
    pixels = decode(raw, max_pixels=_MAX_PIXELS, value_range=value_range).pixels
    suffix, options = (".png", []) if as_png else _ENCODERS.get(kind, (".png", []))
    done, encoded = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise StorageError(f"a {kind} cannot be encoded as {suffix}")
    return bytes(encoded)

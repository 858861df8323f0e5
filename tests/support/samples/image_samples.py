"""One small picture in every format and colour model that is labelled."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 10_000_000


def picture(height: int = 37, width: int = 53, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours with some noise; no two corners alike, so that every turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height)], -1)
    noise = np.random.default_rng(seed).integers(0, 20, (height, width, 3))
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_pillow_sees(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


RGB = Image.fromarray(picture())
PLAIN = {
    "jpeg": encode(RGB, "JPEG"),
    "jpeg 4:4:4": encode(RGB, "JPEG", subsampling=0),
    "jpeg progressive": encode(RGB, "JPEG", progressive=True),
    "jpeg rgb": encode(RGB, "JPEG", keep_rgb=True),
    "jpeg restarts": encode(RGB, "JPEG", restart_marker_blocks=2),
    "jpeg one channel": encode(RGB.convert("L"), "JPEG"),
    "jpeg cmyk": encode(RGB.convert("CMYK"), "JPEG"),
    "png": encode(RGB, "PNG"),
    "png one channel": encode(RGB.convert("L"), "PNG"),
    "png palette": encode(RGB.quantize(31), "PNG"),
    "png palette with transparency": encode(RGB.quantize(31), "PNG", transparency=b"\x00\x80\xff"),
    "png transparent colour": encode(RGB, "PNG", transparency=(0, 0, 0)),
    "png alpha": encode(RGB.convert("RGBA"), "PNG"),
    "png grey and alpha": encode(RGB.convert("LA"), "PNG"),
    "png one bit": encode(RGB.convert("1"), "PNG"),
    "webp": encode(RGB, "WEBP"),
    "webp lossless alpha": encode(RGB.convert("RGBA"), "WEBP", lossless=True),
    "bmp": encode(RGB, "BMP"),
    "bmp palette": encode(RGB.quantize(200), "BMP"),
    "bmp one bit": encode(RGB.convert("1"), "BMP"),
    "tiff": encode(RGB, "TIFF"),
    "tiff lzw": encode(RGB, "TIFF", compression="tiff_lzw"),
    "tiff deflate": encode(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": encode(RGB, "TIFF", compression="jpeg"),
    "tiff cmyk": encode(RGB.convert("CMYK"), "TIFF"),
    "tiff fax": encode(RGB.convert("1"), "TIFF", compression="group4"),
    "tiff alpha": encode(RGB.convert("RGBA"), "TIFF"),
    "big tiff": encode(RGB, "TIFF", big_tiff=True),
    "gif": encode(RGB.quantize(64), "GIF"),
}

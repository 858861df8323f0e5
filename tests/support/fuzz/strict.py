"""A strict second decoder: no ``ok`` without a warning for what it refuses or sees otherwise.

libvips, which gives up at the first error; OpenCV and imagecodecs for the formats that its wheel
does not know. Of a TIFF it sees the first page alone, as we do. Uncompressed strips are read by our
own code, which takes TIFF's defaults for damaged tags: where libvips refuses those, tifffile or
Pillow has to see the same. Nothing but Pillow reads TGA, which is left out.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from storage.errors import ImageError
from tests.support.fuzz.mutations import ANY, mutated
from tests.support.samples.image_samples import encode, picture
from workers.images.decode import decode
from workers.images.pixels import as_rgb, libvips, vips_samples
from workers.images.signatures import format_of
from workers.images.tiff.directories import alone, read_pages

MAX_PIXELS = 2_000_000
OFF = 3.0  # grey levels, mean over the opaque pixels
# libvips takes no GIF canvas above this for real, and no WebP canvas above VP8's own limit.
_GIF_CANVAS, _WEBP_CANVAS = 2048, 16383
Pixels = NDArray[np.uint8]
Decoder = Callable[[bytes], Pixels | None]


@functools.cache
def newer_pictures() -> tuple[bytes, ...]:
    """Formats that came after those of ``seeds.pictures``."""
    large, grey = Image.fromarray(picture(60, 80)), Image.fromarray(picture(60, 80)).convert("L")
    made = [encode(large, "JPEG2000"), encode(grey, "JPEG2000"), encode(large, "AVIF", quality=95)]
    return (*made, encode(large, "PPM"), encode(grey, "PPM"))


def newer_case(seed: int) -> bytes:
    """Return one of them, damaged."""
    rng = random.Random(seed)
    return mutated(rng, rng.choice(newer_pictures()), ANY, newer_pictures())


def compare(data: bytes, seconds: Sequence[Decoder] = ()) -> str:
    """Return what became of a picture; raise AssertionError where the second decoder disagrees.

    Args:
        seconds: the first that reads it counts; empty: those of its format.
    """
    try:
        image = decode(data, max_pixels=MAX_PIXELS)
    except ImageError as exc:
        return exc.status
    if image.warning is not None:
        return "warned"
    kind = format_of(data) or ""
    height, width = image.size
    if kind == "GIF" and max(height, width) > _GIF_CANVAS:
        return "ok, not compared"
    if kind == "WebP" and max(height, width) > _WEBP_CANVAS:
        kind = "large WebP"
    read = (second(data) for second in seconds or _SECOND.get(kind, (by_vips,)))
    theirs = next((pixels for pixels in read if pixels is not None), None)
    assert theirs is not None, f"{kind}: the second decoder refuses it"
    assert theirs.shape == image.pixels.shape, f"{kind}: {theirs.shape}, not {image.pixels.shape}"
    difference = np.abs(image.pixels.astype(np.int16) - theirs)[opaque(data, image.size)]
    off = float(difference.mean()) if difference.size else 0.0
    assert off <= OFF, f"{kind}: {off:.1f} grey levels off"
    return "ok"


def by_opencv(data: bytes) -> Pixels | None:
    """Upright RGB by OpenCV; None: refused."""
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return None if found is None else np.ascontiguousarray(found)


def by_vips(data: bytes) -> Pixels | None:
    """Upright RGB by libvips, evaluated as a whole; None: refused."""
    vips = libvips()
    try:
        image = vips.Image.new_from_buffer(data, "", fail_on="error").autorot()
        samples, model = vips_samples(image), image.interpretation
    except vips.Error:
        return None
    if samples.dtype == np.uint16:
        samples = (samples >> 8).astype(np.uint8)
    if model == "cmyk":
        samples = np.asarray(Image.fromarray(samples[..., :4], "CMYK").convert("RGB"))
    return as_rgb(samples)


def by_vips_page(data: bytes) -> Pixels | None:
    """As ``by_vips``, of a TIFF's first page; damage in further ones is none of this picture."""
    pages = read_pages(data)
    return None if pages is None else by_vips(alone(data, pages)[0])


def by_tifffile(data: bytes) -> Pixels | None:
    """RGB of a TIFF's first page by tifffile; None: refused."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return as_rgb(file.pages[0].asarray())
    except (ValueError, TypeError, LookupError, ArithmeticError, struct.error, OSError):
        return None


def by_pillow(data: bytes) -> Pixels | None:
    """Upright RGB by Pillow; None: refused."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError):
        return None


def by_imagecodecs(data: bytes) -> Pixels | None:
    """RGB of an AVIF or a JPEG 2000 by libavif and OpenJPEG, asked directly; None: refused."""
    import imagecodecs

    read = imagecodecs.avif_decode if format_of(data) == "AVIF" else imagecodecs.jpeg2k_decode
    try:
        return as_rgb(read(data))
    except (imagecodecs.AvifError, imagecodecs.Jpeg2kError, ValueError):
        return None


_SECOND: dict[str, tuple[Decoder, ...]] = {
    "TIFF": (by_vips_page, by_pillow, by_tifffile),
    "BMP": (by_opencv,),
    "PNM": (by_opencv,),
    "large WebP": (by_opencv,),
    "AVIF": (by_imagecodecs,),
    "JPEG 2000": (by_opencv, by_imagecodecs),
}


def opaque(data: bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where the upright image is opaque; everywhere if that is not known."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.has_transparency_data:
                alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
                if (alpha.height, alpha.width) == size:
                    return np.asarray(alpha) == 255
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, zlib.error):
        pass
    return np.ones(size, np.bool_)

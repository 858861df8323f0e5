"""Copies for reviewers: what browsers do not show is written anew, upright, pixel for pixel."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.review.copies import showable
from storage.errors import ImageError, LabelfleetError
from storage.review.queue import Reason, ReviewItem
from tests.support.samples.image_samples import encode, picture
from workers.images.decode import decode

LARGE = Image.fromarray(picture(74, 106))


def heic(image: Image.Image, **options: Any) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def item(data: bytes) -> ReviewItem:
    digest = hashlib.sha256(data).hexdigest()
    return ReviewItem(
        "a", "0" * 16, 0, len(data), digest, 1, 74, 106, 0, "audit", True, "i", 0, 0.1, 1.5, 7.0,
        (Reason("audit", 1.0),),
    )  # fmt: skip


def turned() -> Image.Exif:
    exif = Image.Exif()  # a new one each time: the AVIF plugin takes the orientation out of it
    exif[0x0112] = 6
    return exif


FILES = {
    "HEIC": heic(LARGE, exif=turned().tobytes()),
    "AVIF": encode(LARGE, "AVIF", exif=turned()),
    "JPEG 2000": encode(LARGE, "JPEG2000"),
    "TIFF": encode(LARGE, "TIFF", exif=turned()),
    "TGA": encode(LARGE, "TGA"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_copy_shows_what_was_labelled(kind: str) -> None:
    data = FILES[kind]
    name, shown = showable(item(data), data)
    assert name == f"{hashlib.sha256(data).hexdigest()}.png"
    with Image.open(io.BytesIO(shown)) as copy:
        pixels = np.asarray(copy.convert("RGB"))
    np.testing.assert_array_equal(pixels, decode(data, max_pixels=10**6).pixels)
    expected = picture(74, 106) if kind in ("JPEG 2000", "TGA") else np.rot90(picture(74, 106), -1)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_or_exchanged_file_has_no_copy(kind: str) -> None:
    cut = FILES[kind][: len(FILES[kind]) // 2]
    with pytest.raises(LabelfleetError):
        showable(item(cut), cut)
    with pytest.raises(ImageError, match="not those that were labelled"):
        showable(item(FILES[kind]), FILES["TGA"] + b"x")


def test_a_copy_of_sixteen_bits_shows_the_range_of_the_run() -> None:
    dim = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))
    for kind in ("PNG", "TIFF"):
        data = encode(dim, kind)
        _, shown = showable(item(data), data, "data")
        with Image.open(io.BytesIO(shown)) as copy:
            assert copy.convert("RGB").getextrema() == ((0, 255),) * 3
    _, as_it_is = showable(item(encode(dim, "PNG")), encode(dim, "PNG"))
    assert as_it_is == encode(dim, "PNG")  # full: browsers do the same

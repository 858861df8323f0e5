"""JPEGs that the network sees at half size or less are decoded smaller: same place, near pixels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.errors import Undecodable
from tests.support.samples.image_samples import encode
from workers.images.decode import decode
from workers.images.letterbox import LetterboxTransform, letterbox
from workers.images.pixels import DecodedImage
from workers.images.preprocessing import Preprocessing

MAX = 10**8
COCO = Preprocessing()
TALL = Preprocessing(size=(640, 320), resize_to=(636, 316))
STRETCHED = Preprocessing(size=(64, 64), resize_to=(64, 64), keep_aspect=False)


def photo(width: int, height: int, orientation: int = 1, quality: int = 95) -> bytes:
    """Smooth colours with a bright rectangle from 1/4 to 1/2 of each side (as stored)."""
    ys, xs = np.mgrid[0:height, 0:width]
    pixels = np.stack([xs * 99 // width, ys * 99 // height, (xs + ys) % 50], -1).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(pixels), "JPEG", quality=quality, exif=exif)


def placed(image: DecodedImage, how: Preprocessing) -> tuple[NDArray[np.uint8], LetterboxTransform]:
    return letterbox(image.pixels, how, size=image.size, factor=image.factor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "height", "how", "factor"),
    [
        (640, 480, COCO, 1),
        (1271, 900, COCO, 1),
        (1272, 900, COCO, 2),
        (2543, 1000, COCO, 2),
        (2544, 1000, COCO, 4),
        (5088, 100, COCO, 8),
        (20000, 20, COCO, 8),
        (700, 1272, TALL, 2),
        (630, 1200, TALL, 1),
        (200, 120, STRETCHED, 1),  # the side that shrinks least counts
        (200, 128, STRETCHED, 2),
    ],
)
def test_never_smaller_than_the_letterbox_needs(
    width: int, height: int, how: Preprocessing, factor: int
) -> None:
    image = decode(photo(width, height), max_pixels=MAX, enough=how)
    assert image.factor == factor
    assert image.size == (height, width)
    assert image.pixels.shape == (-(-height // factor), -(-width // factor), 3)
    assert decode(photo(width, height), max_pixels=MAX).pixels.shape == (height, width, 3)


@pytest.mark.parametrize(
    ("width", "height"), [(1300, 1000), (1301, 999), (2561, 1003), (5091, 403)]
)
def test_boxes_come_back_to_the_same_place(width: int, height: int) -> None:
    raw = photo(width, height)
    whole = decode(raw, max_pixels=MAX)
    scaled = decode(raw, max_pixels=MAX, enough=COCO)
    assert scaled.factor > 1
    for image in (whole, scaled):
        pixels, way_back = placed(image, COCO)
        ys, xs = np.nonzero(pixels.min(2) > 180)
        found = [
            (xs.min() - way_back.pad_left) / way_back.scale_x,
            (ys.min() - way_back.pad_top) / way_back.scale_y,
            (xs.max() + 1 - way_back.pad_left) / way_back.scale_x,
            (ys.max() + 1 - way_back.pad_top) / way_back.scale_y,
        ]
        wanted = [width // 4, height // 4, width // 2, height // 2]
        np.testing.assert_allclose(found, wanted, atol=1.5 / way_back.scale_x)
        assert (way_back.width, way_back.height) == (width, height)


def test_pixels_are_those_of_the_whole_image_averaged() -> None:
    noise = np.random.default_rng(0).normal(128, 25, (640, 1280, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 4) * 4 - 384
    raw = encode(Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8)), "JPEG", quality=95)
    scaled = decode(raw, max_pixels=MAX, enough=COCO)
    assert scaled.factor == 2
    whole = decode(raw, max_pixels=MAX).pixels
    averaged = cv2.resize(whole, (640, 320), interpolation=cv2.INTER_AREA)
    apart = np.abs(scaled.pixels.astype(int) - averaged)
    assert apart.mean() < 0.6
    assert np.quantile(apart, 0.999) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sides", [(1600, 1280), (1601, 1283)])
def test_turned_images_are_the_same_scaled_or_whole(
    sides: tuple[int, int], orientation: int
) -> None:
    raw = photo(*sides, orientation)
    scaled = decode(raw, max_pixels=MAX, enough=COCO)
    whole = decode(raw, max_pixels=MAX)
    assert scaled.size == whole.size
    assert scaled.factor == (2 if orientation == 1 or sides[0] % 2 == 0 else 1)
    assert scaled.exif_orientation == whole.exif_orientation == orientation
    one, other = placed(scaled, COCO)[0], placed(whole, COCO)[0]
    apart = np.abs(one.astype(int) - other)
    assert np.median(apart) <= 4  # the stripes of the sample alias where rows are skipped
    assert (apart > 100).mean() < 0.01  # the rectangle lies where it lay


def test_damage_is_found_all_the_same() -> None:
    raw = photo(1600, 1200)
    with pytest.raises(Undecodable):
        decode(raw[: len(raw) // 2], max_pixels=MAX, enough=COCO)

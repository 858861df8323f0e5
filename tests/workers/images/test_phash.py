"""The perceptual hash: near for near duplicates, far for other images, 64 bits always."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support.samples.image_samples import picture
from workers.images.phash import phash


def distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return (phash(one) ^ phash(other)).bit_count()


def real_images(data_dir: Path) -> list[NDArray[np.uint8]]:
    paths = sorted((data_dir / "coco_ccby").rglob("*.jpg"))[:30]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def recompressed(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_near_duplicates_are_near_and_other_images_are_far(data_dir: Path) -> None:
    images = real_images(data_dir)
    for pixels in images:
        half = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        brighter = np.clip(pixels.astype(int) + 15, 0, 255).astype(np.uint8)
        for changed in (half, brighter, recompressed(pixels, 40)):
            assert distance(pixels, changed) <= 8  # type: ignore[arg-type]
    hashes = [phash(pixels) for pixels in images]
    apart = [(a ^ b).bit_count() for n, a in enumerate(hashes) for b in hashes[:n]]
    assert min(apart) > 10
    assert 28 < np.mean(apart) < 36


def test_a_mirrored_image_is_another_image() -> None:
    pixels = picture(200, 300)
    assert distance(pixels, np.ascontiguousarray(pixels[:, ::-1])) > 10


@pytest.mark.parametrize("value", [0, 1, 114, 255])
def test_one_colour_gives_zero(value: int) -> None:
    assert phash(np.full((123, 77, 3), value, np.uint8)) == 0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (31, 33), (3000, 2)])
def test_any_size_gives_an_unsigned_64_bit_number(height: int, width: int) -> None:
    found = phash(picture(height, width))
    assert 0 <= found < 1 << 64
    assert phash(picture(height, width)) == found

"""decode(): what must be labelled like any other image, pixel for pixel as Pillow sees it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.errors import Undecodable, Unsupported
from tests.support.samples.image_samples import (
    MAX_PIXELS,
    PLAIN,
    RGB,
    as_pillow_sees,
    encode,
    picture,
)
from workers.images.decode import decode, probe


@pytest.mark.parametrize("name", PLAIN)
def test_every_colour_model_gives_pillows_pixels(name: str) -> None:
    decoded = decode(PLAIN[name], max_pixels=MAX_PIXELS)
    expected = as_pillow_sees(PLAIN[name])
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    np.testing.assert_array_equal(decoded.pixels, expected)
    assert decoded.exif_orientation == 1
    assert probe(PLAIN[name]) == (53, 37, 1)


def test_adobe_inverted_cmyk_and_ycck_keep_their_colours() -> None:
    # Pillow writes inverted CMYK with an Adobe marker; transform 2 in it makes it YCCK.
    cmyk = bytearray(encode(RGB.convert("CMYK"), "JPEG", quality=95))
    decoded = decode(bytes(cmyk), max_pixels=MAX_PIXELS).pixels.astype(int)
    assert np.abs(decoded - picture()).mean() < 8
    cmyk[cmyk.index(b"Adobe") + 11] = 2
    np.testing.assert_array_equal(
        decode(bytes(cmyk), max_pixels=MAX_PIXELS).pixels, as_pillow_sees(bytes(cmyk))
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(RGB, kind, exif=exif, **options)
    decoded = decode(data, max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(decoded.pixels, as_pillow_sees(data))
    assert decoded.exif_orientation == orientation
    turned = (37, 53) if orientation >= 5 else (53, 37)
    assert probe(data) == (*turned, orientation)


@pytest.mark.parametrize("orientation", [0, 9, 4096])
def test_an_impossible_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, "JPEG", exif=exif)
    decoded = decode(data, max_pixels=MAX_PIXELS)
    assert decoded.exif_orientation == 1
    np.testing.assert_array_equal(decoded.pixels, as_pillow_sees(data))


def test_damaged_exif_costs_the_orientation_and_not_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(RGB, "JPEG", exif=exif))
    start = data.index(b"Exif\0\0") + 6
    data[start : start + 12] = b"\xfe" * 12
    assert decode(bytes(data), max_pixels=MAX_PIXELS).exif_orientation == 1


def test_orientation_from_xmp_counts_as_in_pillow() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="8"/></x:xmpmeta>'
    data = encode(RGB, "JPEG", xmp=xmp)
    decoded = decode(data, max_pixels=MAX_PIXELS)
    assert decoded.exif_orientation == 8
    np.testing.assert_array_equal(decoded.pixels, as_pillow_sees(data))


def wide_grey(bits: int) -> NDArray[np.uint16]:
    return np.linspace(0, 2**bits - 1, 37 * 53).reshape(37, 53).astype(np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_highest_eight_bits(kind: str) -> None:
    grey = wide_grey(16)
    pixels = decode(encode(Image.fromarray(grey), kind), max_pixels=MAX_PIXELS).pixels
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], grey >> 8)


def test_big_endian_tiffs_are_read_in_their_byte_order() -> None:
    grey = wide_grey(16)
    big = io.BytesIO()
    Image.frombytes("I;16B", (53, 37), grey.astype(">u2").tobytes()).save(big, "TIFF")
    np.testing.assert_array_equal(
        decode(big.getvalue(), max_pixels=MAX_PIXELS).pixels[..., 1], grey >> 8
    )


def sixteen_bit_png(pixels: NDArray[np.uint16]) -> bytes:
    import cv2

    encoded = cv2.imencode(".png", pixels)[1]
    return encoded.tobytes()


def test_sixteen_bit_colour_keeps_its_highest_eight_bits() -> None:
    colour = (picture().astype(np.uint16) << 8) | 0x7F
    pixels = decode(sixteen_bit_png(colour), max_pixels=MAX_PIXELS).pixels
    np.testing.assert_array_equal(pixels, picture()[..., ::-1])  # OpenCV writes BGR


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (50, 150, 250)]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    if kind == "WEBP":
        options["lossless"] = True
    decoded = decode(encode(frames[0], kind, **options), max_pixels=MAX_PIXELS)
    assert decoded.pixels.shape == (20, 30, 3)
    np.testing.assert_array_equal(decoded.pixels, 50)


def test_a_two_picture_jpeg_gives_its_main_one() -> None:
    data = encode(RGB, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert decode(data, max_pixels=MAX_PIXELS).pixels.shape == (37, 53, 3)


@pytest.mark.parametrize(
    ("samples", "said"), [("I", "32 signed bits"), ("F", "32 float bits"), ("LAB", "CIELAB")]
)
def test_samples_without_an_eight_bit_meaning_are_unsupported(samples: str, said: str) -> None:
    data = encode(Image.new(samples, (8, 8)), "TIFF")
    with pytest.raises(Unsupported, match=said):
        decode(data, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypisom\0\0\0\0", "MP4"),
        (b"\x76\x2f\x31\x01", "OpenEXR"),
        (b"%PDF-1.7", "PDF"),
    ],
)
def test_known_formats_that_are_not_labelled_are_named(start: bytes, name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        decode(start + bytes(100), max_pixels=MAX_PIXELS)


def test_a_saved_error_page_is_called_what_it_is() -> None:
    with pytest.raises(Undecodable, match="not an image but text"):
        decode(b"<!DOCTYPE html><html>404</html>", max_pixels=MAX_PIXELS)


@pytest.mark.slow
def test_the_real_images_decode_to_pillows_pixels(data_dir: Path) -> None:
    paths = sorted(p for p in data_dir.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    assert len(paths) > 1000
    for path in paths:
        data = path.read_bytes()
        decoded = decode(data, max_pixels=MAX_PIXELS)
        np.testing.assert_array_equal(decoded.pixels, as_pillow_sees(data), err_msg=str(path))
        assert probe(data) == (decoded.pixels.shape[1], decoded.pixels.shape[0], 1)

"""One image becomes network input or a row that says why not; never an exception."""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from storage.records import AnnotationRow, ImageRecord, Status
from tests.support.samples.image_samples import encode
from tests.support.samples.synthetic_run import boxes
from workers.images.letterbox import LetterboxTransform
from workers.images.prepare import OpenedImage, open_image
from workers.images.preprocessing import Preprocessing

INPUT = Preprocessing(size=(96, 128), resize_to=(92, 124), padding="center")
MAX_PIXELS = 1_000_000


def png(width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return encode(Image.fromarray(pixels), "PNG")


def record_of(raw: bytes | None, *, status: Status = "ok", error: str | None = None) -> ImageRecord:
    nbytes = len(raw) if raw is not None else 123
    return ImageRecord("a.tar/1.png", 512, nbytes, raw, status, error)


def opened_image(raw: bytes, how: Preprocessing = INPUT) -> OpenedImage:
    opened = open_image(record_of(raw), "5" * 16, how, MAX_PIXELS)
    assert isinstance(opened, OpenedImage)
    return opened


def labelled(raw: bytes, *found: list[float]) -> tuple[AnnotationRow, NDArray[np.uint8]]:
    """Return the row of an image with boxes in input pixels, and the slot that it was placed in."""
    slot = np.full((96, 128, 3), 99, np.uint8)
    opened = opened_image(raw)
    transform = opened.place(INPUT, slot)
    assert isinstance(transform, LetterboxTransform)
    opened.release()
    detections = boxes(list(found), [0.9] * len(found), [0] * len(found))
    return opened.row(transform.invert(detections)), slot


def failed_row(raw: bytes | None, **fields: object) -> AnnotationRow:
    row = open_image(record_of(raw, **fields), "5" * 16, INPUT, MAX_PIXELS)  # type: ignore[arg-type]  # by name
    assert isinstance(row, AnnotationRow)
    assert row.error
    assert len(row.detections) == 0
    return row


def test_an_image_becomes_network_input_that_knows_where_it_came_from() -> None:
    raw = png()
    at = opened_image(raw).place(INPUT, np.empty((96, 128, 3), np.uint8))
    assert isinstance(at, LetterboxTransform)
    left, top = at.pad_left, at.pad_top
    row, slot = labelled(raw, [left, top, left + 40 * at.scale_x, top + 30 * at.scale_y])
    assert (slot[0] == 114).all()
    assert not (slot == 99).all(2).any()
    np.testing.assert_allclose(row.detections.boxes, [[0, 0, 40, 30]], atol=1e-3)
    assert (row.width, row.height, row.status, row.error) == (40, 30, "ok", None)
    assert row.fields == (
        "a.tar/1.png", "5" * 16, 512, len(raw), hashlib.sha256(raw).hexdigest(),
    )  # fmt: skip


def test_an_image_that_cannot_be_placed_is_a_row_with_its_size() -> None:
    slot = np.empty((96, 128, 3), np.uint8)
    slot.flags.writeable = False
    row = opened_image(png(width=50, height=20)).place(INPUT, slot)
    assert isinstance(row, AnnotationRow)
    assert (row.status, row.width, row.height) == ("undecodable", 50, 20)
    assert row.error
    assert "read-only" in row.error
    assert row.image_id == "a.tar/1.png"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", "undecodable"),
        (png()[:200], "undecodable"),
        (b"this is text", "undecodable"),
        (encode(Image.new("RGB", (1001, 1000)), "PNG"), "too_large"),
    ],
)
def test_a_bad_image_becomes_a_row_with_its_digest(raw: bytes, status: Status) -> None:
    row = failed_row(raw)
    assert row.status == status
    assert row.sha256 == hashlib.sha256(raw).hexdigest()
    assert row.phash is None


def test_a_size_that_the_header_tells_is_in_the_row_all_the_same() -> None:
    row = failed_row(encode(Image.new("RGB", (1001, 1000)), "PNG"))
    assert (row.width, row.height) == (1001, 1000)


@pytest.mark.parametrize("status", ["missing", "too_large", "unsupported"])
def test_what_was_not_read_keeps_the_reader_s_reason(status: Status) -> None:
    row = failed_row(None, status=status, error="as the reader said")
    assert (row.status, row.error, row.sha256) == (status, "as the reader said", "")
    assert (row.width, row.height, row.nbytes) == (0, 0, 123)


def test_bytes_that_are_not_there_without_a_reason_are_missing() -> None:
    assert failed_row(None).status == "missing"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_no_damage_to_the_bytes_ever_raises(seed: int, changes: int) -> None:
    chance = random.Random(seed)
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF"):
        raw = bytearray(encode(Image.new("RGB", (32, 24), (seed % 256, 7, 99)), kind))
        for _ in range(changes):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        found = open_image(record_of(bytes(raw)), "5" * 16, INPUT, MAX_PIXELS)
        if isinstance(found, AnnotationRow):
            assert found.status in ("undecodable", "too_large", "unsupported")
            assert found.error
        else:
            found.place(INPUT, np.empty((96, 128, 3), np.uint8))


def test_frames_and_warnings_reach_the_row() -> None:
    pages = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    animated = encode(pages[0], "GIF", save_all=True, append_images=pages[1:])
    trailed = encode(pages[0], "JPEG") + b"1234"
    for data, frames, warning in (
        (animated, 2, None),
        (trailed, 1, "trailing bytes: 4 after the image's end"),
    ):
        row, _ = labelled(data)
        assert (row.status, row.frames, row.warning) == ("ok", frames, warning)


def test_exact_gives_a_jpeg_and_a_png_of_its_pixels_the_same_input_and_fast_does_not() -> None:
    big = Image.fromarray(
        np.random.default_rng(2).integers(0, 256, (400, 600, 3), np.uint8)
    ).resize((1200, 800))
    jpeg = encode(big, "JPEG", quality=95)
    same = encode(Image.open(io.BytesIO(jpeg)), "PNG")
    slots = {}
    for mode in ("exact", "fast"):
        for name, data in (("jpeg", jpeg), ("png", same)):
            slot = np.zeros((96, 128, 3), np.uint8)
            how = replace(INPUT, decode=mode)  # type: ignore[arg-type]
            opened = opened_image(data, how)
            assert opened.image.factor == (8 if (mode, name) == ("fast", "jpeg") else 1)
            opened.place(how, slot)
            slots[mode, name] = slot
    np.testing.assert_array_equal(slots["exact", "jpeg"], slots["exact", "png"])
    assert np.abs(slots["fast", "jpeg"].astype(int) - slots["exact", "jpeg"]).mean() > 1


def test_the_range_of_samples_is_the_preprocessing_s() -> None:
    dim = np.linspace(0, 1000, 96 * 128).reshape(96, 128).astype(np.uint16)
    data = encode(Image.fromarray(dim), "PNG")
    opened = opened_image(data, replace(INPUT, value_range="data"))
    assert opened.image.pixels.max() == 255

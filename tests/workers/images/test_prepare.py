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

from storage.records import ImageRecord, Status
from tests.support.samples.image_samples import encode
from tests.support.samples.synthetic_run import boxes
from workers.images.prepare import Opened, Prepared, Skipped, open_image
from workers.images.preprocessing import Preprocessing

INPUT = Preprocessing(size=(96, 128), resize_to=(92, 124), padding="center")
MAX_PIXELS = 1_000_000


def png(width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return encode(Image.fromarray(pixels), "PNG")


def record_of(raw: bytes | None, *, status: Status = "ok", error: str | None = None) -> ImageRecord:
    nbytes = len(raw) if raw is not None else 123
    return ImageRecord("a.tar/1.png", 512, nbytes, raw, status, error)


def prepare(raw: ImageRecord) -> tuple[Prepared | Skipped, NDArray[np.uint8]]:
    """Opened and placed, and the slot."""
    slot = np.full((96, 128, 3), 99, np.uint8)
    opened = open_image(raw, "5" * 16, INPUT, MAX_PIXELS)
    return (opened if isinstance(opened, Skipped) else opened.place(INPUT, slot)), slot


def skipped(raw: bytes | None, **fields: object) -> Skipped:
    found, _ = prepare(record_of(raw, **fields))  # type: ignore[arg-type]  # by name
    assert isinstance(found, Skipped)
    assert found.row.error
    assert len(found.row.detections) == 0
    return found


def test_an_image_becomes_network_input_that_knows_where_it_came_from() -> None:
    raw = png()
    found, slot = prepare(record_of(raw))
    assert isinstance(found, Prepared)
    assert (slot[0] == 114).all()
    assert not (slot == 99).all(2).any()
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    at = found.transform
    left, top = at.pad_left, at.pad_top
    whole = [left, top, left + 40 * at.scale_x, top + 30 * at.scale_y]
    row = found.row(boxes([whole], [0.9], [0]))
    np.testing.assert_allclose(row.detections.boxes, [[0, 0, 40, 30]], atol=1e-3)
    assert (row.width, row.height, row.status, row.error) == (40, 30, "ok", None)
    assert (row.image_id, row.shard_id, row.offset, row.nbytes) == (
        "a.tar/1.png", "5" * 16, 512, len(raw),
    )  # fmt: skip


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
    row = skipped(raw).row
    assert row.status == status
    assert row.sha256 == hashlib.sha256(raw).hexdigest()
    assert row.phash is None


def test_a_size_that_the_header_tells_is_in_the_row_all_the_same() -> None:
    row = skipped(encode(Image.new("RGB", (1001, 1000)), "PNG")).row
    assert (row.width, row.height) == (1001, 1000)


@pytest.mark.parametrize("status", ["missing", "too_large", "unsupported"])
def test_what_was_not_read_keeps_the_reader_s_reason(status: Status) -> None:
    row = skipped(None, status=status, error="as the reader said").row
    assert (row.status, row.error, row.sha256) == (status, "as the reader said", "")
    assert (row.width, row.height, row.nbytes) == (0, 0, 123)


def test_bytes_that_are_not_there_without_a_reason_are_missing() -> None:
    assert skipped(None).row.status == "missing"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_no_damage_to_the_bytes_ever_raises(seed: int, changes: int) -> None:
    chance = random.Random(seed)
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF"):
        raw = bytearray(encode(Image.new("RGB", (32, 24), (seed % 256, 7, 99)), kind))
        for _ in range(changes):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        found, _ = prepare(record_of(bytes(raw)))
        if isinstance(found, Skipped):
            assert found.row.status in ("undecodable", "too_large", "unsupported")
            assert found.row.error


def test_frames_and_warnings_reach_the_row() -> None:
    pages = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    animated = encode(pages[0], "GIF", save_all=True, append_images=pages[1:])
    trailed = encode(pages[0], "JPEG") + b"1234"
    for data, frames, warning in (
        (animated, 2, None),
        (trailed, 1, "trailing bytes: 4 after the image's end"),
    ):
        placed, _ = prepare(record_of(data))
        assert isinstance(placed, Prepared)
        row = placed.row(boxes([], [], []))
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
            opened = open_image(record_of(data), "5" * 16, how, MAX_PIXELS)
            assert isinstance(opened, Opened)
            assert opened.image.factor == (8 if (mode, name) == ("fast", "jpeg") else 1)
            opened.place(how, slot)
            slots[mode, name] = slot
    np.testing.assert_array_equal(slots["exact", "jpeg"], slots["exact", "png"])
    assert np.abs(slots["fast", "jpeg"].astype(int) - slots["exact", "jpeg"]).mean() > 1


def test_the_range_of_samples_is_the_preprocessing_s() -> None:
    dim = np.linspace(0, 1000, 96 * 128).reshape(96, 128).astype(np.uint16)
    data = encode(Image.fromarray(dim), "PNG")
    opened = open_image(record_of(data), "5" * 16, replace(INPUT, value_range="data"), MAX_PIXELS)
    assert isinstance(opened, Opened)
    assert opened.image.pixels.max() == 255

"""A very large TIFF is read in strips onto disk: the same pixels, and little memory."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from storage.errors import Undecodable
from storage.records import ImageRecord
from tests.support.samples.peak_memory import PeakMemory
from workers.images.decode import decode
from workers.images.letterbox import LetterboxTransform
from workers.images.pixels import in_memory, let_go, lies_on_disk, on_disk, shrunk_from_disk
from workers.images.prepare import OpenedImage, open_image
from workers.images.preprocessing import Preprocessing, Tiles, Window
from workers.images.tiff import decode as tiff

STRIP = 20_000 * 640 * 3  # bytes of a row of tiles of the large picture


def written(path: Path, side: int, **options: object) -> bytes:
    """A TIFF of smooth colours, written a strip at a time."""
    import pyvips

    places = pyvips.Image.xyz(side, side)
    red, green = places.extract_band(0) / (side / 250), places.extract_band(1) / (side / 240)
    image = red.bandjoin([green, 255 - red]).cast("uchar").copy(interpretation="srgb")
    image.tiffsave(str(path), compression="deflate", **options)
    return path.read_bytes()


@pytest.mark.parametrize("options", [{}, {"tile": True, "tile_width": 128, "tile_height": 256}])
def test_strips_hold_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    data = written(tmp_path / "a.tif", 700, **options)
    whole = decode(data, max_pixels=10**6)
    assert lies_on_disk(whole.pixels) is None
    monkeypatch.setattr(tiff, "STRIPED_PIXELS", 1)
    striped = decode(data, max_pixels=10**6)
    assert lies_on_disk(striped.pixels) is not None
    np.testing.assert_array_equal(striped.pixels, whole.pixels)
    assert (striped.size, striped.frames, striped.warning) == ((700, 700), 1, None)


@pytest.mark.parametrize("rows", [1, 3, 33, 129, 700])
@pytest.mark.parametrize("compression", ["tiff_lzw", "raw"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_strips_of_the_file_may_have_any_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, rows: int, compression: str, mode: str
) -> None:
    bands = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    noise = np.random.default_rng(0).integers(0, 256, (700, 120, bands), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.squeeze(), mode).save(
        file, "TIFF", compression=compression, tiffinfo={278: rows}, strip_size=rows * 120 * bands
    )
    whole = decode(file.getvalue(), max_pixels=10**6)
    monkeypatch.setattr(tiff, "STRIPED_PIXELS", 1)
    striped = decode(file.getvalue(), max_pixels=10**6)
    assert lies_on_disk(striped.pixels) is not None
    np.testing.assert_array_equal(striped.pixels, whole.pixels)


def test_a_damaged_one_is_still_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.errors import Undecodable

    data = bytearray(written(tmp_path / "a.tif", 700))
    data[2000:2400] = bytes(400)
    monkeypatch.setattr(tiff, "STRIPED_PIXELS", 1)
    with pytest.raises(Undecodable, match="damaged TIFF"):
        decode(bytes(data), max_pixels=10**6)


def test_shrinking_from_disk_is_opencvs_within_one() -> None:
    pixels = on_disk(901, 1203)
    assert pixels is not None
    pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    let_go(pixels)
    wanted = cv2.resize(np.array(pixels), (320, 240), interpolation=cv2.INTER_LINEAR)
    got = shrunk_from_disk(pixels, 320, 240)
    assert np.abs(got.astype(int) - wanted).max() <= 1


def test_a_part_from_disk_is_a_copy_and_one_in_memory_is_itself() -> None:
    pixels = on_disk(200, 300)
    assert pixels is not None
    pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    window = Window(17, 31, 200, 101)
    part = in_memory(window.of(pixels))
    assert lies_on_disk(part) is None
    np.testing.assert_array_equal(part, window.of(np.array(pixels)))
    assert in_memory(part) is part


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_stays_far_below_the_picture(tmp_path: Path) -> None:
    data = written(tmp_path / "large.tif", 20_000)
    preprocessing, slot = Preprocessing(), np.empty((640, 640, 3), np.uint8)

    def opened(encoded: bytes) -> OpenedImage:
        found = open_image(
            ImageRecord("x", 0, len(encoded), encoded), "", preprocessing, 400_000_000
        )
        assert isinstance(found, OpenedImage)
        return found

    opened(written(tmp_path / "small.tif", 640)).place(preprocessing, slot)
    peak = PeakMemory()
    large = opened(data)
    for window in Tiles(640).windows(20_000, 20_000)[::40]:  # the last one is the whole
        assert isinstance(large.place(preprocessing, slot, window), LetterboxTransform)
    # The picture itself would take 1,200 MB.
    assert peak.growth() <= 3 * STRIP


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("samples", [1, 3])
def test_an_uncompressed_page_is_read_as_it_is_stored(order: str, rows: int, samples: int) -> None:
    values = np.random.default_rng(rows).integers(0, 256, (64, 48, samples)).astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(
        file, values.squeeze(), byteorder=order, rowsperstrip=min(rows, 64),
        photometric="rgb" if samples == 3 else "minisblack",
    )  # fmt: skip
    data = file.getvalue()
    found = decode(data, max_pixels=values.size)
    expected = np.broadcast_to(values, (64, 48, 3))
    np.testing.assert_array_equal(found.pixels, expected)
    np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), expected)
    assert found.warning is None
    with pytest.raises(Undecodable):  # cut off, it is libvips that says so
        decode(data[: len(data) // 2], max_pixels=values.size)

"""Pages and animation frames: how many there are, and the pixels of each."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from storage.errors import TooLarge, Undecodable
from storage.shards.frames import frame_bytes
from workers.images.decode import decode, probe
from workers.images.frames import count_frames
from workers.images.pixels import libvips
from workers.images.tiff.directories import DirectoryReader, TiffPage, alone, read_pages

PIXELS = 1 << 20


def pictures(count: int = 4, height: int = 24, width: int = 32) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (count, height // 8, width // 8, 3), np.uint8)
    return list(coarse.repeat(8, axis=1).repeat(8, axis=2))


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    count = 2 if kind == "MPO" else 4  # of more, Pillow writes wrong offsets
    first, *rest = (Image.fromarray(p) for p in pictures()[:count])
    first.save(file, kind, save_all=True, append_images=rest, **options)
    return file.getvalue()


def frame(data: bytes, number: int) -> NDArray[np.uint8]:
    return decode(frame_bytes(data, number), max_pixels=PIXELS).pixels


@pytest.mark.parametrize(
    ("kind", "options", "off"),
    [
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 12),
        ("AVIF", {"quality": 95}, 12),
        ("GIF", {}, 12),
        ("MPO", {"quality": 95, "subsampling": 0}, 6),
    ],
)
def test_each_frame_has_its_own_pixels(kind: str, options: dict[str, Any], off: float) -> None:
    data = saved(kind, **options)
    count = 2 if kind == "MPO" else 4
    assert count_frames(data, PIXELS) == count
    for number in (1, 2, count - 1, count, 2, 1, count):  # in any order
        right = pictures()[number - 1].astype(np.int16)
        found = frame(data, number)
        assert found.shape == right.shape
        assert np.abs(found - right).mean() <= off, number
        others = [p for n, p in enumerate(pictures(), 1) if n != number]
        assert all(np.abs(found.astype(np.int16) - p).mean() > 20 for p in others)
    whole, last = (decode(frame_bytes(data, n), max_pixels=PIXELS) for n in (1, count))
    assert whole.frames == count
    assert last.frames == count
    with pytest.raises(Undecodable, match=r"no (frame|page|picture) 5"):
        frame(data, 5)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 2, 3), (3,)])
def test_a_frame_that_is_taken_back_is_not_below_the_next_one(order: tuple[int, ...]) -> None:
    """As the specification has it: APNG, dispose_op 2 (APNG_DISPOSE_OP_PREVIOUS)."""
    red, blue = (Image.new("RGBA", (32, 24), c) for c in ((255, 0, 0, 255), (0, 0, 255, 255)))
    dot = Image.new("RGBA", (32, 24), (0, 0, 0, 0))
    dot.putpixel((5, 5), (0, 255, 0, 255))
    file = io.BytesIO()
    red.save(file, "PNG", save_all=True, append_images=[blue, dot], disposal=[0, 2, 0], blend=1)
    right = {1: (255, 0, 0), 2: (0, 0, 255), 3: (255, 0, 0)}
    for number in order:
        pixels = frame(file.getvalue(), number)
        assert tuple(pixels[20, 20]) == right[number], number
    assert tuple(frame(file.getvalue(), 3)[5, 5]) == (0, 255, 0)


def test_heif_pictures_of_other_sizes_are_probed_as_they_are_decoded() -> None:
    heif = pytest.importorskip("pillow_heif")
    made = heif.HeifFile()
    for width in (64, 96):
        made.add_from_pillow(Image.new("RGB", (width, 64), (90, 90, 90)))
    file = io.BytesIO()
    made.save(file)
    for number, width in ((1, 64), (2, 96)):
        data = frame_bytes(file.getvalue(), number)
        assert probe(data) == (width, 64, 1)
        assert decode(data, max_pixels=PIXELS).size == (64, width)


def test_heif_pictures_begin_with_the_primary_one() -> None:
    heif = pytest.importorskip("pillow_heif")
    made = heif.HeifFile()
    for picture in pictures(3, 64, 64):
        made.add_from_pillow(Image.fromarray(picture))
    file = io.BytesIO()
    made.save(file, quality=-1, chroma=444, primary_index=1)
    data = file.getvalue()
    assert count_frames(data, PIXELS) == 3
    for number, right in enumerate((1, 0, 2), 1):
        off = np.abs(frame(data, number).astype(np.int16) - pictures(3, 64, 64)[right])
        assert off.mean() < 6, number


def test_dicom_frames() -> None:
    pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file
    from pydicom.pixels import pixel_array

    path = get_testdata_file("SC_rgb_rle_2frame.dcm", download=False)
    data = Path(str(path)).read_bytes()
    right = np.asarray(pixel_array(str(path)))
    assert count_frames(data, PIXELS) == len(right) == 2
    for number in (1, 2):
        assert np.array_equal(frame(data, number), right[number - 1])


def test_pages_of_different_sizes_and_smaller_copies() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tiff:
        tiff.write(np.full((20, 30, 3), 10, np.uint8), photometric="rgb")
        tiff.write(np.full((5, 8, 3), 10, np.uint8), photometric="rgb", subfiletype=1)
        tiff.write(np.full((40, 50), 60_000, np.uint16), photometric="minisblack")
    data = file.getvalue()
    assert count_frames(data, PIXELS) == 2
    assert frame(data, 2).shape == (40, 50, 3)
    assert set(np.unique(frame(data, 2))) == {60_000 >> 8}
    assert probe(frame_bytes(data, 2)) == (50, 40, 1)
    with pytest.raises(TooLarge):
        decode(frame_bytes(data, 2), max_pixels=1000)
    assert decode(data, max_pixels=1000).size == (20, 30)


def many_pages(count: int, **options: Any) -> bytes:
    """Page k is k modulo 251 all over; every third has a smaller copy behind it."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file, **options) as tiff:
        for number in range(count):
            tiff.write(np.full((16, 16), number % 251, np.uint8), compression="zlib")
            if number % 3 == 0:
                tiff.write(np.zeros((8, 8), np.uint8), compression="zlib", subfiletype=1)
    return file.getvalue()


def test_a_chain_of_pages_is_not_walked_again_for_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[int] = []
    read_one = DirectoryReader.page

    def counted(reader: DirectoryReader, at: int) -> tuple[TiffPage, int]:
        reads.append(at)
        return read_one(reader, at)

    monkeypatch.setattr(DirectoryReader, "page", counted)
    data = many_pages(90)
    total = count_frames(data, PIXELS)
    found = [frame(data, number) for number in range(1, total + 1)]
    assert [int(pixels[0, 0, 0]) for pixels in found] == list(range(90))
    # Three walks over pages and copies, the first 64 twice, and two reads for each page.
    assert len(reads) <= 3 * 120 + 2 * 65 + 2 * 90


@pytest.mark.parametrize("big", [False, True], ids=["classic", "big"])
@pytest.mark.parametrize("order", "<>")
def test_decoders_are_given_a_page_as_the_only_one(order: str, big: bool) -> None:
    data = many_pages(7, byteorder=order, bigtiff=big)
    for number in (1, 5, 7):
        pages = read_pages(data, number)
        assert pages is not None
        single, of_one = alone(data, pages)
        assert (of_one.index, of_one.frames) == (0, 7)
        assert (seen := read_pages(single)) is not None
        assert seen.frames == 1
        image = libvips().Image.tiffload_buffer(single)
        assert image.get_n_pages() == 1
        assert image.numpy().tolist() == np.full((16, 16), number - 1).tolist()
        assert int(frame(data, number)[0, 0, 0]) == number - 1


@pytest.mark.slow
def test_a_hundred_thousand_frames_are_counted_and_read_as_far_as_they_are_wanted() -> None:
    data = saved("GIF")
    last = data[data.rindex(b"\x2c\0\0\0\0") : -1]
    bomb = data[:-1] + last * 100_000 + b";"
    assert count_frames(bomb, PIXELS) == 100_004
    assert frame(bomb, 6).shape == (24, 32, 3)


def test_a_gif_that_grows_is_not_said_to_be_as_large_as_its_first_frame() -> None:
    data = bytearray(saved("GIF"))
    second = data.index(b"\x2c", data.index(b"\x2c\0\0\0\0") + 10)
    second = data.index(b"\x2c\0\0\0\0", second - 1)
    data[second + 1 : second + 3] = b"\x08\0"  # 8 pixels to the right
    assert decode(bytes(data), max_pixels=PIXELS).size == (24, 32)
    grown = frame_bytes(bytes(data), 2)
    assert decode(grown, max_pixels=PIXELS).size == (24, 40)
    assert probe(grown) is None


def test_a_process_short_of_memory_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> int:
        raise MemoryError

    monkeypatch.setattr("workers.images.frames._gif_frames", without)
    assert count_frames(saved("GIF"), PIXELS) == 1, "there is memory: the file is to blame"
    monkeypatch.setattr("workers.images.frames.check_room", without)
    with pytest.raises(MemoryError):
        count_frames(saved("GIF"), PIXELS)


def test_damage_counts_as_one() -> None:
    data = saved("GIF")
    assert count_frames(data[:40], PIXELS) == 1
    assert count_frames(b"", PIXELS) == 1


def test_a_gain_map_is_no_picture() -> None:
    first, second = (Image.fromarray(p) for p in pictures(2))
    for other in (second.resize((16, 12)), second):
        file = io.BytesIO()
        other.encoderinfo = {"xmp": b'<rdf hdrgm:Version="1.0"/>'}
        first.save(file, "MPO", save_all=True, append_images=[other])
        assert b"MPF\0" in file.getvalue()
        assert count_frames(file.getvalue(), PIXELS) == 1


def test_entries_of_an_mpo_that_lie_within_each_other_are_one_picture() -> None:
    data = saved("MPO")
    at = data.index(b"\x02\xb0\x07\x00")  # MPEntry, UNDEFINED, little-endian
    (nbytes,) = struct.unpack_from("<I", data, at + 4)
    (entries,) = struct.unpack_from("<I", data, at + 8)
    begin = data.index(b"MPF\0") + 4
    table = data[begin + entries : begin + entries + nbytes]
    assert count_frames(data, PIXELS) == 2
    same = table[16:32] * 2
    hostile = data.replace(table, same)
    assert count_frames(hostile, PIXELS) == 2

"""An image that a strict decoder refuses, or sees otherwise, is not ``ok`` without a warning."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from storage.errors import Undecodable, Unsupported
from storage.records import warning_kinds
from tests.support.fuzz.strict import compare
from tests.support.fuzz.targets import TARGETS
from tests.support.samples.image_samples import PLAIN, RGB, encode, picture
from workers.images.decode import decode, probe
from workers.images.pixels import DecodedImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
Chunk = tuple[bytes, bytes]


def decoded(data: bytes) -> DecodedImage:
    return decode(data, max_pixels=10**7)


def kinds(data: bytes) -> list[str]:
    return warning_kinds(decoded(data).warning)


def chunks_of(data: bytes) -> list[Chunk]:
    found, at = [], 8
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : end]))
        at = end + 4
    return found


def png(*chunks: Chunk) -> bytes:
    parts = [
        struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks
    ]
    return b"".join([SIGNATURE, *parts])


WHOLE = chunks_of(PLAIN["png"])
HEADER, IDAT, END = WHOLE[0], next(c for c in WHOLE if c[0] == b"IDAT"), WHOLE[-1]


# What earlier campaigns found.
@pytest.mark.parametrize("seed", [4393, 5116, 9927, 4341, 3352, 1315, 2640, 5135, 232])
def test_pictures_that_were_ok_although_a_strict_decoder_disagreed(seed: int) -> None:
    compare(TARGETS["pictures strict"].case(seed))


def test_the_comparison_itself_notices() -> None:
    assert compare(PLAIN["png"]) == "ok"
    with pytest.raises(AssertionError, match="refuses"):
        compare(PLAIN["png"], (lambda _: None,))
    with pytest.raises(AssertionError, match="not \\(37, 53, 3\\)"):
        compare(PLAIN["png"], (lambda _: picture(53, 37),))
    with pytest.raises(AssertionError, match="grey levels off"):
        compare(PLAIN["png"], (lambda _: picture() ^ 4,))


def test_a_wrong_checksum_of_the_compressed_data_is_undecodable() -> None:
    body = bytearray(IDAT[1])
    body[-1] ^= 1  # adler32; the chunk's own checksum is right, and so is every pixel
    with pytest.raises(Undecodable, match="pixels cannot be read"):
        decoded(png(HEADER, (b"IDAT", bytes(body)), END))


def test_compressed_data_that_ends_early_or_late_is_undecodable() -> None:
    rows = zlib.decompress(IDAT[1])
    for wrong in (rows[:-1], rows[:-400]):
        with pytest.raises(Undecodable):
            decoded(png(HEADER, (b"IDAT", zlib.compress(wrong)), END))


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([HEADER, HEADER, IDAT, END], "two headers"),
        ([(b"tEXt", b"a\0b"), HEADER, IDAT, END], "begin with its header"),
        ([HEADER, (b"IDAT", IDAT[1][:50]), (b"tEXt", b"a\0b"), (b"IDAT", IDAT[1][50:]), END],
         "between its pixels"),
        ([HEADER, END], "no pixels"),
        ([(b"IHDR", HEADER[1] + b"\0\0"), IDAT, END], "13 bytes"),
        ([(b"IHDR", HEADER[1][:10] + b"\7" + HEADER[1][11:]), IDAT, END], "compression 7"),
        ([(b"IHDR", HEADER[1][:9] + b"\3" + HEADER[1][10:]), IDAT, END], "without its palette"),
    ],
)  # fmt: skip
def test_critical_chunks_out_of_place_are_undecodable(chunks: list[Chunk], said: str) -> None:
    with pytest.raises(Undecodable, match=said):
        decoded(png(*chunks))


def test_apples_own_pngs_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="CgBI"):
        decoded(png((b"CgBI", b"\x50\0\x20\6"), HEADER, IDAT, END))


def test_a_png_without_its_end_chunk_is_warned_about() -> None:
    np.testing.assert_array_equal(decoded(png(HEADER, IDAT)).pixels, picture())
    assert kinds(png(HEADER, IDAT)) == ["premature end"]


def test_the_static_image_of_an_animation_is_taken_wherever_its_frames_stand() -> None:
    frames = [Image.fromarray(picture(20, 30, seed)) for seed in range(3)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert decoded(data).frames == 3
    chunks = chunks_of(data)
    still = [c for c in chunks if c[0] == b"IDAT"]
    moved = [c for c in chunks[:-1] if c[0] != b"IDAT"] + still + [chunks[-1]]
    np.testing.assert_array_equal(decoded(png(*moved)).pixels, picture(20, 30, 0))
    # An image that stands in for the animation is one more than its frames.
    no_first = [c for c in chunks if c[0] != b"fcTL"]
    assert decoded(png(*no_first)).frames == 4


def oriented(kind: str, value: int, *, damaged: bool) -> bytes:
    """An image whose EXIF has a description that may point far behind its end, then a turn."""
    where = struct.pack(">I", 0x80000000 if damaged else 38)
    exif = b"MM\0*\0\0\0\x08\0\x02" + b"\x01\x0e\0\2\0\0\0\5" + where
    exif += b"\x01\x12\0\3\0\0\0\1" + struct.pack(">HH", value, 0) + b"\0\0\0\0said\0"
    return encode(RGB, kind, exif=b"Exif\0\0" + exif if kind != "PNG" else exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damaged", [False, True])
def test_one_damaged_entry_does_not_cost_the_orientation(kind: str, damaged: bool) -> None:
    data = oriented(kind, 6, damaged=damaged)
    assert decoded(data).exif_orientation == 6
    assert probe(data) == (37, 53, 6)
    assert decoded(data).pixels.shape == (53, 37, 3)


def test_xmp_still_tells_the_orientation_of_a_png() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    body = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    data = png(HEADER, (b"iTXt", body), IDAT, END)
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6
    assert decoded(data).exif_orientation == 6


def test_bmps_whose_header_lies_are_warned_about() -> None:
    whole = encode(RGB, "BMP")
    assert decoded(whole).warning is None
    np.testing.assert_array_equal(decoded(whole[:-1]).pixels, picture())  # padding is missing
    assert kinds(whole[:-1]) == ["premature end"]
    assert kinds(whole[:10] + b"\0\0\0\0" + whole[14:]) == ["corrupt data"]


def test_bytes_between_a_gifs_blocks_are_warned_about() -> None:
    whole = encode(RGB, "GIF")
    at = 13 + 3 * 256 if whole[10] & 7 == 7 else 13 + (3 << (whole[10] & 7) + 1)
    assert decoded(whole).warning is None
    assert kinds(whole[:at] + b"\0" + whole[at:]) == ["corrupt data"]


def test_samples_that_a_tiffs_tags_do_not_name_are_warned_about() -> None:
    whole = bytearray(encode(RGB, "TIFF"))
    assert decoded(bytes(whole)).warning is None
    (start,) = struct.unpack_from("<I", whole, 4)
    for k in range(struct.unpack_from("<H", whole, start)[0]):
        entry = start + 2 + 12 * k
        if struct.unpack_from("<H", whole, entry)[0] == 262:
            struct.pack_into("<H", whole, entry + 8, 1)  # photometric: grey
    assert kinds(bytes(whole)) == ["ignored bands"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1)])
def test_an_image_of_one_row_or_column_keeps_its_shape(
    kind: str, mode: str, size: tuple[int, int]
) -> None:
    data = encode(Image.new(mode, size, "white"), kind)
    assert decoded(data).pixels.shape == (size[1], size[0], 3)
    assert decoded(data).pixels.min() >= 250


def test_codecs_that_libvips_lacks_are_pillows() -> None:
    data = encode(RGB, "TIFF", compression="lzma")
    np.testing.assert_array_equal(decoded(data).pixels, picture())

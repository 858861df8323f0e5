"""decode() on damaged and hostile files: an error with its reason, never a crash or a guess."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storage.errors import ImageError, TooLarge, Undecodable
from tests.support.samples.image_samples import MAX_PIXELS, PLAIN, RGB, as_pillow_sees, encode
from tests.support.samples.peak_memory import PeakMemory
from workers.images.decode import decode, probe

ROOT = Path(__file__).resolve().parents[3]
CHUNK = tuple[bytes, bytes]


def png(*chunks: CHUNK) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in chunks:
        checksum = zlib.crc32(name + body)
        parts += [struct.pack(">I", len(body)), name, body, struct.pack(">I", checksum)]
    return b"".join(parts)


def png_header(width: int, height: int) -> CHUNK:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def webp(width: int, height: int) -> bytes:
    extended = b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + extended
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(tags: dict[int, int]) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes(64)


def gif(width: int, height: int) -> bytes:
    data = bytearray(PLAIN["gif"])
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(PLAIN["jpeg"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


PIXELS = zlib.compress(
    bytes(90_001 * 3000), 1
)  # the first rows are there: only the header can refuse it
BOMBS: dict[str, bytes] = {
    "png": png(png_header(30_000, 30_000), (b"IDAT", PIXELS), (b"IEND", b"")),
    "bmp": bmp(30_000, 30_000),
    "bmp upside down": bmp(30_000, -30_000),
    "webp": webp(16_383, 16_383),
    "tiff": tiff({256: 30_000, 257: 30_000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 279: 64}),
    "gif": gif(65_000, 65_000),
    "jpeg": jpeg(65_000, 65_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_from_its_header(name: str) -> None:
    memory = PeakMemory()
    with pytest.raises(TooLarge, match="pixels; this run takes up to 178956970"):
        decode(BOMBS[name], max_pixels=178_956_970)
    assert memory.growth() < 64 << 20


@pytest.mark.parametrize("name", BOMBS)
def test_a_refused_image_still_has_its_size(name: str) -> None:
    memory = PeakMemory()
    found = probe(BOMBS[name])
    assert memory.growth() < 64 << 20
    assert found is not None
    assert found[0] * found[1] > 178_956_970
    assert found[2] == 1


def test_a_size_beyond_int32_is_refused_and_not_told() -> None:
    tags = {256: 2**32 - 1, 257: 2**32 - 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 279: 64}
    with pytest.raises(TooLarge):
        decode(tiff(tags), max_pixels=MAX_PIXELS)
    assert probe(tiff(tags)) is None


@pytest.mark.parametrize("name", ["png", "bmp", "webp", "tiff"])
def test_an_image_without_pixels_is_undecodable(name: str) -> None:
    empty = {
        "png": png(png_header(0, 5), (b"IDAT", PIXELS), (b"IEND", b"")),
        "bmp": bmp(0, 5),
        "webp": webp(1, 5)[:24] + bytes(6),
        "tiff": tiff({256: 0, 257: 5, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 279: 64}),
    }
    with pytest.raises(Undecodable):
        decode(empty[name], max_pixels=MAX_PIXELS)


def test_the_limit_itself_is_allowed() -> None:
    assert decode(PLAIN["png"], max_pixels=37 * 53).pixels.shape == (37, 53, 3)
    with pytest.raises(TooLarge):
        decode(PLAIN["png"], max_pixels=37 * 53 - 1)


def test_a_huge_tile_behind_a_small_tiff_is_refused() -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 324: 8, 325: 9}
    tags |= {322: 30_000, 323: 30_000}  # TileWidth, TileLength
    memory = PeakMemory()
    with pytest.raises(TooLarge, match="30000×30000"):
        decode(tiff(tags), max_pixels=MAX_PIXELS)
    assert memory.growth() < 64 << 20


ZEROS = zlib.compress(bytes(200 << 20), 1)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"note\0\0" + ZEROS),
        (b"iTXt", b"note\0\1\0\0\0" + ZEROS),
        (b"iCCP", b"note\0\0" + ZEROS),
        (b"tEXt", b"note\0" + b"x" * (2 << 20)),
    ],
)
def test_bombs_in_png_metadata_cost_no_memory_and_not_the_image(chunk: CHUNK) -> None:
    rows = zlib.compress((b"\0" + bytes([7, 8, 9]) * 4) * 4)
    data = png(png_header(4, 4), chunk, (b"IDAT", rows), (b"IEND", b""))
    memory = PeakMemory()
    np.testing.assert_array_equal(
        decode(data, max_pixels=MAX_PIXELS).pixels, np.full((4, 4, 3), [7, 8, 9])
    )
    assert memory.growth() < 64 << 20


def test_a_jpeg_with_thousands_of_scans_is_refused() -> None:
    data = encode(RGB.resize((1000, 1000)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at : data.rindex(b"\xff\xd9")]
    with pytest.raises(TooLarge, match="scans"):
        decode(data[:at] + scan * 2000 + b"\xff\xd9", max_pixels=MAX_PIXELS)


def test_a_jpeg_of_countless_tiny_scans_is_refused_before_all_are_followed() -> None:
    # Of a size that is allowed they took half an hour, in which nothing else may be finished.
    tiny = b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 100_000
    frame = b"\xff\xc0\0\x0b\x08\0\x10\0\x10\1\1\x11\0"
    with pytest.raises(TooLarge, match="more than 4096 scans"):
        decode(b"\xff\xd8" + frame + tiny + b"\xff\xd9", max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("missing", [1, 2, 3, 5, 10, 50, 200])
@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg one channel", "jpeg cmyk"])
def test_a_jpeg_with_its_last_bytes_missing_is_undecodable(name: str, missing: int) -> None:
    with pytest.raises(Undecodable, match="truncated"):
        decode(PLAIN[name][:-missing], max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("name", [n for n in PLAIN if "fax" not in n])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_never_labelled_as_if_whole(name: str, share: float) -> None:
    whole = PLAIN[name]
    cut = whole[: int(len(whole) * share)]
    try:
        pixels = decode(cut, max_pixels=MAX_PIXELS).pixels
    except Undecodable:
        return
    # A TIFF's or GIF's last bytes may be a directory or trailer that its pixels do not need.
    np.testing.assert_array_equal(pixels, as_pillow_sees(whole))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0"])
def test_empty_and_headless_files_are_undecodable(data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(data, max_pixels=MAX_PIXELS)
    assert probe(data) is None


def test_an_empty_file_is_called_empty() -> None:
    with pytest.raises(Undecodable, match="empty"):
        decode(b"", max_pixels=MAX_PIXELS)


DAMAGED = st.sampled_from(sorted(PLAIN)).flatmap(
    lambda name: st.lists(
        st.tuples(st.integers(0, len(PLAIN[name]) - 1), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    ).map(lambda edits: (name, edits))
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(DAMAGED)
def test_damaged_bytes_give_an_image_or_one_of_our_errors(
    damage: tuple[str, list[tuple[int, int]]],
) -> None:
    name, edits = damage
    data = bytearray(PLAIN[name])
    for at, value in edits:
        data[at] = value
    try:
        decoded = decode(bytes(data), max_pixels=MAX_PIXELS)
    except ImageError:
        pass
    else:
        height, width = decoded.pixels.shape[:2]
        assert height * width <= MAX_PIXELS
    probe(bytes(data))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM", b"GIF89a"]),
    st.binary(max_size=300),
)
def test_noise_behind_a_signature_gives_one_of_our_errors(start: bytes, noise: bytes) -> None:
    for data in (start + noise, b"RIFF\xff\0\0\0WEBP" + noise):
        with suppress(ImageError):
            decode(data, max_pixels=MAX_PIXELS)
        probe(data)


DECODE_DAMAGED = """
from tests.support.samples.image_samples import MAX_PIXELS, PLAIN
from storage.errors import ImageError
from workers.images.decode import decode
tried = 0
for whole in PLAIN.values():
    half = len(whole) // 2
    for data in (whole[: half * 4 // 3], whole[:half] + bytes(range(40)) + whole[half + 40 :]):
        try:
            decode(data, max_pixels=MAX_PIXELS)
        except ImageError:
            tried += 1
count = b"\\x15\\1\\3\\0\\1\\0\\0\\0"  # the tag SamplesPerPixel, one short
samples = PLAIN["tiff"].replace(count + b"\\3", count + b"\\xff")
assert samples != PLAIN["tiff"]
try:
    decode(samples, max_pixels=MAX_PIXELS)
except ImageError:
    tried += 1
print(tried)
"""


@pytest.mark.slow
def test_the_decoders_write_nothing_to_the_workers_log() -> None:
    paths = os.pathsep.join([str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-c", DECODE_DAMAGED],
        env=os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "always::UserWarning"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) > 20
    assert ran.stderr == ""


def test_a_renamed_file_is_decoded_by_its_content() -> None:
    # Names never reach decode(): a PNG called .jpg is a PNG.
    buffer = io.BytesIO(PLAIN["png"])
    np.testing.assert_array_equal(
        decode(buffer.getvalue(), max_pixels=MAX_PIXELS).pixels,
        np.asarray(Image.open(buffer).convert("RGB")),
    )

"""A count that stands in a file takes no memory before it is checked."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.errors import TooLarge, Undecodable
from tests.support.samples.peak_memory import PeakMemory
from workers.images.decode import decode, probe
from workers.images.signatures import jpeg_xl_size
from workers.images.tiff.directories import exif_orientation, read_pages

MIB = 1 << 20
Tags = dict[int, tuple[str, list[int]]]  # by number: a struct code, and the values


def directories(pages: int, nbytes: int) -> bytes:
    """A TIFF whose directories all point at the same values; the first says orientation 6."""
    shared = (256, 257, 258, 262, 273, 277, 278, 279, 284, 322, 323, 324, 325, 338, 339, 34675)
    size = 2 + 12 * (len(shared) + 1) + 4
    behind = 8 + pages * size
    parts = [b"II*\0" + struct.pack("<I", 8)]
    for page in range(pages):
        entries = [struct.pack("<HHII", tag, 3, nbytes // 2, behind) for tag in shared]
        entries.append(struct.pack("<HHIHH", 274, 3, 1, 6, 0))
        following = 8 + (page + 1) * size if page + 1 < pages else 0
        parts += [struct.pack("<H", len(entries)), *entries, struct.pack("<I", following)]
    return b"".join([*parts, b"\xff\x7f" * (nbytes // 2)])


def tiff(tags: Tags, strip: bytes) -> bytes:
    """A TIFF of one directory, its strips all the same bytes at offset 8."""
    at = 8 + len(strip) + len(strip) % 2
    entries, behind = b"", b""
    for tag, (code, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{code}", *values)
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[code], len(values))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack("<I", at + 6 + 12 * len(tags) + len(behind))
            behind += packed + bytes(len(packed) % 2)
    body = (b"II*\0" + struct.pack("<I", at) + strip).ljust(at, b"\0")
    return body + struct.pack("<H", len(tags)) + entries + bytes(4) + behind


def many_bands(side: int, bands: int) -> bytes:
    """Grey in band k of column x is x + k, in deflated strips of one row."""
    values = np.arange(side)[:, None] + np.arange(bands)
    strip = zlib.compress(values.astype(np.uint8).tobytes(), 9)
    tags: Tags = {
        256: ("H", [side]), 257: ("H", [side]), 258: ("H", [8] * bands), 259: ("H", [8]),
        262: ("H", [1]), 273: ("I", [8] * side), 277: ("H", [bands]), 278: ("H", [1]),
        279: ("I", [len(strip)] * side), 338: ("H", [0] * (bands - 1)), 339: ("H", [1] * bands),
    }  # fmt: skip
    return tiff(tags, strip)


def with_exif(kind: str, exif: bytes) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 32), (9, 99, 9))
    if kind == "JPEG":
        image.save(buffer, kind, exif=b"Exif\0\0" + exif)
    else:
        image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_that_points_at_its_values_many_times_costs_no_memory(kind: str) -> None:
    data = with_exif(kind, directories(100, 40_000))
    decode(with_exif(kind, directories(1, 2)), max_pixels=10**6)  # libraries are loaded
    memory = PeakMemory()
    found = decode(data, max_pixels=10**6)
    assert probe(data) == (32, 64, 6)
    assert memory.growth() < 16 * MIB
    assert (found.exif_orientation, found.pixels.shape) == (6, (64, 32, 3))


@pytest.mark.slow
def test_pages_that_share_their_values_cost_no_memory() -> None:
    data = directories(60_000, 400_000)
    memory = PeakMemory()
    pages = read_pages(data)
    with pytest.raises(TooLarge, match="32767×32767"):
        decode(data, max_pixels=1000)
    assert memory.growth() < 32 * MIB
    assert pages is not None
    assert pages.frames > 0
    assert len(pages.leading) == 64


def test_pages_are_counted_whole() -> None:
    pages = read_pages(directories(1000, 2))
    assert pages is not None
    assert pages.frames == 1000  # SubfileType is not in them


def test_directories_that_overlap_are_read_once() -> None:
    """Each claims 65,535 entries, 4 bytes further than the one before; so do their links."""
    count = 60_000
    far = 2 + 12 * 65_535
    data = bytearray(b"II*\0" + struct.pack("<I", 8) + b"\xff" * (far + 4 * count + 64))
    for k in range(count):
        struct.pack_into("<I", data, 8 + 4 * k + far, 8 + 4 * (k + 1))
    start = time.process_time()
    memory = PeakMemory()
    read_pages(bytes(data))
    with pytest.raises((Undecodable, TooLarge)):
        decode(bytes(data), max_pixels=1000)
    assert exif_orientation(bytes(data)) is None
    assert time.process_time() - start < 10  # 4 billion entries
    assert memory.growth() < 16 * MIB


def test_thousands_of_bands_are_refused_from_the_header() -> None:
    data = many_bands(400, 2500)
    memory = PeakMemory()
    with pytest.raises(TooLarge, match="2500 samples of 8 bits is 400000000 bytes; this run takes"):
        decode(data, max_pixels=400 * 400)
    assert memory.growth() < 16 * MIB


def test_bands_within_the_limit_are_held_by_libvips_alone() -> None:
    data = many_bands(400, 2500)
    decode(many_bands(8, 4), max_pixels=10**6)
    memory = PeakMemory()
    found = decode(data, max_pixels=400 * 400 * 2500 // 16)
    assert memory.growth() < 600 * MIB  # all samples are 381 MiB; a copy would make it 833
    np.testing.assert_array_equal(found.pixels[17, :, 1], np.arange(400).astype(np.uint8))


def test_the_limit_of_samples_is_exact() -> None:
    data = many_bands(16, 64)  # 16 KiB
    assert decode(data, max_pixels=1024).pixels.shape == (16, 16, 3)
    with pytest.raises(TooLarge, match="16384 bytes; this run takes up to 16368"):
        decode(data, max_pixels=1023)


@pytest.mark.slow
@pytest.mark.parametrize("said", [0, -20, None], ids=["right", "wrong", "absent"])
def test_a_deflated_dicom_is_not_inflated_beyond_the_limit(said: int | None) -> None:
    pytest.importorskip("pydicom")
    uid = b"1.2.840.10008.1.2.1.99"
    meta = b"\2\0\x10\0UI" + struct.pack("<H", len(uid)) + uid
    length = b""
    if said is not None:
        length = b"\2\0\0\0UL\4\0" + struct.pack("<I", len(meta) + said)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(bytes(300 * MIB)) + deflate.flush()
    data = bytes(128) + b"DICM" + length + meta + packed
    memory = PeakMemory()
    with pytest.raises(TooLarge, match="deflated DICOM of more than"):
        decode(data, max_pixels=64)
    assert probe(data) is None
    assert memory.growth() < 32 * MIB


def deflated_dicom(values: NDArray[np.uint8], *, conformant: bool = True, behind: int = 0) -> bytes:
    """A deflated DICOM of grey values; ``behind``: zero bytes more in its pixel data."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import DeflatedExplicitVRLittleEndian, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2"
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2"
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PhotometricInterpretation, dataset.PixelData = (
        "MONOCHROME2",
        values.tobytes() + bytes(behind),
    )
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=conformant)
    return file.getvalue()


def grey_noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("conformant", [True, False])
def test_a_deflated_dicom_within_the_limit_is_read(conformant: bool) -> None:
    pytest.importorskip("pydicom")
    values = grey_noise(1200, 1600)
    data = deflated_dicom(values, conformant=conformant)
    found = decode(data, max_pixels=values.size)
    np.testing.assert_array_equal(found.pixels[..., 0], values)
    assert probe(data) == (1600, 1200, 1)


@pytest.mark.slow
def test_a_deflated_dicom_is_inflated_as_far_as_its_header_asks() -> None:
    """200 MiB behind a small image, with a limit of pixels that would allow 2.7 GiB."""
    pytest.importorskip("pydicom")
    data = deflated_dicom(grey_noise(64, 64), behind=200 * MIB)
    assert len(data) < MIB
    memory = PeakMemory()
    with pytest.raises(TooLarge, match="deflated DICOM of more than"):
        decode(data, max_pixels=178_956_970)
    assert memory.growth() < 32 * MIB
    few = deflated_dicom(grey_noise(64, 64), behind=MIB // 2)
    assert decode(few, max_pixels=4096).pixels.shape == (64, 64, 3)
    with pytest.raises(TooLarge, match="64"):
        decode(few, max_pixels=4095)


def jxl_header(width: int, height: int, *, orientation: int = 1, container: str = "") -> bytes:
    """The beginning of a JPEG XL codestream, bit by bit as ISO/IEC 18181-1 has it."""
    bits: list[int] = []

    def put(value: int, count: int) -> None:
        bits.extend(value >> i & 1 for i in range(count))

    def side(pixels: int) -> None:
        selector, count = next((s, n) for s, n in enumerate((9, 13, 18, 30)) if pixels <= 1 << n)
        put(selector, 2)
        put(pixels - 1, count)

    put(0, 1)  # not small
    side(height)
    put(0, 3)  # no ratio
    side(width)
    put(0, 1)  # not all default
    put(1, 1)  # extra fields
    put(orientation - 1, 3)
    put(0, -len(bits) % 8)
    packed = bytes(sum(bit << i for i, bit in enumerate(bits[at : at + 8]))
                   for at in range(0, len(bits), 8))  # fmt: skip
    stream = b"\xff\x0a" + packed + bytes(64)
    if not container:
        return stream

    def box(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", 8 + len(body)) + kind + body

    head = b"\0\0\0\x0cJXL \r\n\x87\n" + box(b"ftyp", b"jxl \0\0\0\0jxl ") + box(b"Exif", bytes(99))
    if container == "jxlc":
        return head + box(b"jxlc", stream)
    # In parts of three bytes, each with its number.
    parts = [stream[at : at + 3] for at in range(0, len(stream), 3)]
    return head + b"".join(box(b"jxlp", struct.pack(">I", i) + p) for i, p in enumerate(parts))


@pytest.mark.parametrize("container", ["", "jxlc", "jxlp"])
@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (513, 8192), (100_000, 262_144), (1 << 30, 1 << 30)]
)
def test_a_jpeg_xl_says_its_size_before_it_is_decoded(
    width: int, height: int, container: str
) -> None:
    data = jxl_header(width, height, container=container)
    assert jpeg_xl_size(data) == (width, height)
    turned = jxl_header(width, height, orientation=6, container=container)
    assert jpeg_xl_size(turned) == (height, width)
    pytest.importorskip("pillow_jxl")
    assert probe(data) == (width, height, 1)
    if width * height > 1000:
        with pytest.raises(TooLarge):
            decode(data, max_pixels=width * height - 1)


@pytest.mark.parametrize(
    ("width", "height"),
    [(8, 8), (256, 256), (264, 8), (100, 100), (120, 100), (400, 300), (33, 22), (48, 27),
     (1920, 1080), (50, 40), (200, 100), (641, 479), (1, 700)],
)  # fmt: skip
def test_the_size_is_the_decoders_for_small_sides_and_ratios(width: int, height: int) -> None:
    pytest.importorskip("pillow_jxl")
    import pillow_jxl  # noqa: F401  # registers the format

    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(file, "JXL")
    assert jpeg_xl_size(file.getvalue()) == (width, height)
    assert decode(file.getvalue(), max_pixels=width * height).pixels.shape == (height, width, 3)


@pytest.mark.parametrize(
    "data",
    [b"\xff\x0a", b"\xff\x0a\x06", b"\0\0\0\x0cJXL \r\n\x87\n",
     b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 64],
)  # fmt: skip
def test_a_jpeg_xl_without_a_header_is_damaged(data: bytes) -> None:
    with pytest.raises(Undecodable, match="damaged JPEG XL"):
        jpeg_xl_size(data)

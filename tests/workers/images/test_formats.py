"""decode(): what each format asks for, by the right pixels, and what is said about odd files."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from storage.errors import TooLarge, Undecodable, Unsupported
from storage.records import warning_kinds
from tests.support.samples.image_samples import MAX_PIXELS, PLAIN, RGB, encode, picture
from workers.images.decode import decode, probe
from workers.images.pixels import DecodedImage

Array = NDArray[Any]


def decoded(data: bytes, **options: Any) -> DecodedImage:
    return decode(data, max_pixels=MAX_PIXELS, **options)


def kinds(data: bytes) -> list[str]:
    return warning_kinds(decoded(data).warning)


def tiff(values: Array, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def grey_rgb(grey: Array) -> Array:
    return np.repeat(grey[..., None], 3, axis=-1)


# -- damage


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("exif", [False, True])
def test_a_png_with_zeroed_bytes_is_never_ok(share: float, exif: bool) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (200, 200, 3), np.uint8))
    data = bytearray(encode(noise, "PNG", **({"exif": tags} if exif else {})))
    at = int(len(data) * share)
    data[at : at + 64] = bytes(64)
    with pytest.raises(Undecodable):
        decoded(bytes(data))


def with_chunk(name: bytes, body: bytes, *, right_crc: bool) -> bytes:
    crc = zlib.crc32(name + body) ^ (0 if right_crc else 0xDEADBEEF)
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)
    data = PLAIN["png"]
    return data[:33] + chunk + data[33:]  # behind IHDR


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"tEXt", b"note\0x"),
        (b"gAMA", struct.pack(">I", 45455)),
        (b"pHYs", struct.pack(">IIB", 2835, 2835, 1)),
        (b"iCCP", b"p\0\0" + zlib.compress(b"x" * 128)),
    ],
)
def test_a_wrong_checksum_of_an_ancillary_chunk_costs_a_warning(name: bytes, body: bytes) -> None:
    data = with_chunk(name, body, right_crc=False)
    np.testing.assert_array_equal(decoded(data).pixels, picture())
    assert kinds(data) == ["corrupt data"]


def test_a_wrong_checksum_of_the_pixels_is_undecodable() -> None:
    data = bytearray(PLAIN["png"])
    at = data.index(b"IDAT") + 4 + struct.unpack(">I", data[data.index(b"IDAT") - 4 :][:4])[0]
    data[at] ^= 1
    with pytest.raises(Undecodable):
        decoded(bytes(data))


# -- JPEG


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg one channel", "jpeg cmyk"])
def test_what_follows_a_jpeg_is_not_the_image(name: str) -> None:
    whole = decoded(PLAIN[name]).pixels
    motion = b"\0\0\0\x18ftypmp42" + b"\xff\xda\xff\xd9" * 100_000 + b"junk"
    for behind in (motion, b"\0" * 7, PLAIN["jpeg"]):
        np.testing.assert_array_equal(decoded(PLAIN[name] + behind).pixels, whole)
        expected = f"trailing bytes: {len(behind)} after the image's end"
        assert decoded(PLAIN[name] + behind).warning == expected
    # A cut image is not made whole by what was appended to it.
    with pytest.raises(Undecodable, match="truncated"):
        decoded(PLAIN[name][:-40] + b"\0" * 60)


def test_a_jpeg_cut_inside_its_data_is_warned_about() -> None:
    data = encode(RGB.resize((400, 300)), "JPEG")
    assert kinds(data[: len(data) * 2 // 3] + b"\xff\xd9") == ["premature end"]


@pytest.mark.parametrize(
    ("marker", "precision", "said"),
    [(0xC1, 12, "JPEG of 12 bits, 3"), (0xC3, 8, "lossless JPEG of 8 bits"), (0xC7, 8, "hierarch")],
)
def test_jpegs_that_are_not_read_are_named(marker: int, precision: int, said: str) -> None:
    data = bytearray(PLAIN["jpeg"])
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, precision
    with pytest.raises(Unsupported, match=said):
        decoded(bytes(data))


def test_a_colour_profile_that_is_not_applied_is_named() -> None:
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        assert decoded(encode(RGB, kind, icc_profile=srgb)).warning is None
        assert kinds(encode(RGB, kind, icc_profile=lab)) == ["ignored colour profile"]


# -- TIFF

WIDE = (picture().astype(np.uint16) << 8) | 0x55
GREY16 = np.linspace(0, 65535, 37 * 53).reshape(37, 53).astype(np.uint16)


@pytest.mark.parametrize("tile", [None, (32, 32)])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_sixteen_bit_colour_tiffs(
    planar: Any, order: Any, bigtiff: bool, tile: tuple[int, int] | None
) -> None:
    values = WIDE if planar == "contig" else np.moveaxis(WIDE, -1, 0)
    options = {"photometric": "rgb", "planarconfig": planar, "byteorder": order, "tile": tile}
    data = tiff(values, bigtiff=bigtiff, **options)
    np.testing.assert_array_equal(decoded(data).pixels, picture())
    assert probe(data) == (53, 37, 1)


@pytest.mark.parametrize("bits", [8, 16])
def test_inverted_grey_tiffs(bits: int) -> None:
    grey = GREY16 if bits == 16 else (GREY16 >> 8).astype(np.uint8)
    data = tiff(grey, photometric="miniswhite")
    np.testing.assert_array_equal(decoded(data).pixels, grey_rgb(255 - (GREY16 >> 8)))


@pytest.mark.parametrize("full_range", [True, False])
def test_a_palette_of_eight_bit_values_in_a_tiff_is_not_black(full_range: bool) -> None:
    indices = np.arange(37 * 53, dtype=np.uint8).reshape(37, 53)
    palette = np.random.default_rng(3).integers(0, 256, (3, 256), np.uint16)
    palette[:, 0] = 0
    data = tiff(indices, photometric="palette", colormap=palette * 257 if full_range else palette)
    np.testing.assert_array_equal(decoded(data).pixels, np.moveaxis(palette[:, indices], 0, -1))


@pytest.mark.parametrize("code", [1, 3, 4])  # BYTE, SHORT, LONG
def test_the_orientation_of_a_tiff_may_be_of_any_type(code: int) -> None:
    data = tiff(picture(), photometric="rgb", extratags=[(274, code, 1, 6, True)])
    found = decoded(data)
    assert found.exif_orientation == 6
    np.testing.assert_array_equal(found.pixels, np.rot90(picture(), -1))
    assert probe(data) == (37, 53, 6)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("samples", [2, 4, 5])
def test_alpha_and_further_bands_of_a_tiff_are_dropped(samples: int, planar: Any) -> None:
    bands = np.dstack([picture(), picture()[..., :2]])
    used = bands[..., :samples]
    photometric = "rgb" if samples > 2 else "minisblack"
    extra = ["unspecified"] * (samples - (3 if samples > 2 else 1))
    values = used if planar == "contig" else np.moveaxis(used, -1, 0)
    data = tiff(values, photometric=photometric, planarconfig=planar, extrasamples=extra)
    expected = picture() if samples > 2 else grey_rgb(picture()[..., 0])
    np.testing.assert_array_equal(decoded(data).pixels, expected)


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        (WIDE.astype(np.float32), {"photometric": "rgb"}, "3 samples of 32 float bits, RGB"),
        (GREY16.astype(np.uint32), {}, "1 samples of 32 bits, grey, compression none"),
        (GREY16, {"photometric": "minisblack", "compression": "lerc"}, "compression LERC"),
        (picture(), {"photometric": "cielab"}, "CIELAB"),
    ],
)
def test_tiffs_that_are_not_read_are_named(values: Array, options: Any, said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        decoded(tiff(values, **options))


def test_of_a_pyramid_the_full_image_counts() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as out:
        out.write(picture()[::2, ::2], photometric="rgb", subfiletype=1)
        out.write(picture(), photometric="rgb")
    found = decoded(file.getvalue())
    assert (found.size, found.frames) == ((37, 53), 1)
    np.testing.assert_array_equal(found.pixels, picture())


def camera_raw() -> bytes:
    """A thumbnail in front, and in a SubIFD what the sensor saw: a NEF's or DNG's layout."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as out:
        out.write(picture(), photometric="rgb", subifds=1, subfiletype=1)
        out.write(GREY16, photometric=32803, subfiletype=0)
    return file.getvalue()


def test_a_camera_raw_is_not_labelled_by_its_thumbnail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decoded(camera_raw()).pixels.astype(int)  # a ramp, from dark to bright
    assert found[-5:].mean() > found[:5].mean() + 100
    assert np.abs(found - picture()).mean() > 30
    monkeypatch.setitem(sys.modules, "rawpy", None)
    with pytest.raises(Unsupported, match=r"camera RAW: install labelfleet\[raw\]"):
        decoded(camera_raw())


# -- BMP


@pytest.mark.parametrize(
    ("bits", "masks"),
    [
        (16, (0xF800, 0x07E0, 0x001F)),
        (16, (0x0F00, 0x00F0, 0x000F)),
        (32, (0x3FF00000, 0x000FFC00, 0x000003FF)),
        (32, (0x00FF0000, 0x0000FF00, 0x000000FF)),
        (32, (0x000000FF, 0x0000FF00, 0x00FF0000)),
    ],
)
@pytest.mark.parametrize("top_down", [False, True])
def test_bitfields_of_a_bmp(bits: int, masks: tuple[int, ...], top_down: bool) -> None:
    height, width = 5, 7
    rng = np.random.default_rng(bits)
    lows = [(m & -m).bit_length() - 1 for m in masks]
    tops = [m >> low for m, low in zip(masks, lows, strict=True)]
    channels = [rng.integers(0, top + 1, (height, width), np.uint32) for top in tops]
    packed = sum(c << np.uint32(low) for c, low in zip(channels, lows, strict=True))
    stride = (width * bits + 31) // 32 * 4
    rows = np.zeros((height, stride), np.uint8)
    body = np.asarray(packed).astype("<u2" if bits == 16 else "<u4")
    rows[:, : width * bits // 8] = body.view(np.uint8).reshape(height, -1)
    rows = rows if top_down else rows[::-1]
    header = struct.pack("<IiiHHIIiiII", 40, width, -height if top_down else height, 1, bits, 3,
                         0, 0, 0, 0, 0)  # fmt: skip
    head = b"BM" + struct.pack("<IHHI", 66 + rows.size, 0, 0, 66)
    found = decoded(head + header + struct.pack("<III", *masks) + rows.tobytes())
    expected = np.stack(
        [np.floor(c * (255 / t) + 0.5) for c, t in zip(channels, tops, strict=True)], -1
    )
    np.testing.assert_array_equal(found.pixels, expected)


# -- the other formats


def heif(image: Image.Image, **options: Any) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, **options)
    return file.getvalue()


def jpeg_xl(image: Image.Image, **options: Any) -> bytes:
    import pillow_jxl  # noqa: F401

    return encode(image, "JXL", lossless=True, **options)


LOSSLESS: dict[str, Callable[[], bytes]] = {
    "JPEG 2000": lambda: encode(RGB, "JPEG2000"),
    "JPEG 2000 codestream": lambda: encode(RGB, "JPEG2000", no_jp2=True),
    "PPM": lambda: encode(RGB, "PPM"),
    "TGA": lambda: encode(RGB, "TGA"),
    "TGA, packed": lambda: encode(RGB, "TGA", compression="tga_rle"),
    "JPEG XL": lambda: jpeg_xl(RGB),
    "HEIF": lambda: heif(RGB, chroma=444, matrix_coefficients=0),
    "AVIF": lambda: encode(RGB, "AVIF", quality=100, subsampling="4:4:4"),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_further_formats_give_their_pixels(name: str) -> None:
    data = LOSSLESS[name]()
    found = decoded(data)
    off = np.abs(found.pixels.astype(int) - picture())
    assert off.max() <= (0 if name != "AVIF" else 4)  # AVIF's 8-bit YCbCr is not lossless
    assert (found.exif_orientation, found.frames, found.warning) == (1, 1, None)
    assert probe(data) == (53, 37, 1)
    with pytest.raises(TooLarge):
        decode(data, max_pixels=37 * 53 - 1)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_file_of_a_further_format_is_never_ok(name: str, share: float) -> None:
    data = LOSSLESS[name]()
    with pytest.raises((Undecodable, Unsupported)):
        decoded(data[: int(len(data) * share)])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_further_formats_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    big = Image.fromarray(cv2.resize(picture(), (106, 74)))
    reference = decoded(encode(big, "PNG", exif=exif)).pixels
    if kind == "AVIF":
        data = encode(big, "AVIF", quality=95, exif=exif)
    else:
        data = heif(big, exif=exif.tobytes())
    found = decoded(data)
    assert found.pixels.shape == reference.shape
    assert np.abs(found.pixels.astype(int) - reference).mean() < 4


def psd(*, depth: int = 8, mode: int = 3, composite: bool = True) -> bytes:
    """A flat Photoshop file of raw planes."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 37, 53, depth, mode)
    version = struct.pack(">I?", 1, composite) + bytes(8)
    resources = b"8BIM" + struct.pack(">HHI", 1057, 0, len(version)) + version
    resources += b"\0" * (len(version) % 2)
    planes = np.moveaxis(picture(), -1, 0).tobytes()
    return (header + struct.pack(">I", 0) + struct.pack(">I", len(resources)) + resources
            + struct.pack(">I", 0) + struct.pack(">H", 0) + planes)  # fmt: skip


def test_of_a_photoshop_file_the_composite() -> None:
    np.testing.assert_array_equal(decoded(psd()).pixels, picture())
    with pytest.raises(Unsupported, match="without its composite"):
        decoded(psd(composite=False))
    with pytest.raises(Unsupported, match="Photoshop version 1, RGB, 16 bits, 3 channels"):
        decoded(psd(depth=16))


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("pillow_heif", "HEIF", "heif"), ("pillow_jxl.JpegXLImagePlugin", "JPEG XL", "jxl")],
)
def test_without_its_extra_a_format_says_what_to_install(
    package: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LOSSLESS[name]()
    monkeypatch.setitem(sys.modules, package, None)  # what an absent package looks like
    with pytest.raises(Unsupported, match=rf"install labelfleet\[{extra}\]"):
        decoded(data)


# -- DICOM


def dicom(values: Array, *, inverted: bool = False, window: tuple[int, int] | None = None) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = io.BytesIO()
    dataset = FileDataset(file, {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *values.shape, 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
    dataset.PixelData = values.astype("<u2").tobytes()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_a_dicom_image_is_windowed() -> None:
    values = np.arange(4096).reshape(64, 64)
    np.testing.assert_array_equal(decoded(dicom(values)).pixels[..., 0], values >> 4)
    np.testing.assert_array_equal(
        decoded(dicom(values, inverted=True)).pixels[..., 1], 255 - (values >> 4)
    )
    # PS3.3, C.11.2.1.2.1: black at and below c - .5 - (w - 1) / 2, white above c - .5 + (w - 1) / 2
    shown = decoded(dicom(values, window=(1000, 401))).pixels[..., 0].astype(int).ravel()
    assert (shown[:800] == 0).all()
    assert (shown[1200:] == 255).all()
    np.testing.assert_allclose(
        shown[800:1200], (np.arange(800, 1200) - 799.5) / 400 * 255, atol=0.51
    )


# -- samples of more than 8 bits


def dim() -> Array:
    return (GREY16 // 65).astype(np.uint16)  # up to 1008: a 10-bit camera's


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_nearly_black_image_is_warned_about_and_stretched_on_request(kind: str) -> None:
    data = encode(Image.fromarray(dim()), kind)
    plain = decoded(data)
    assert plain.pixels.max() == dim().max() >> 8
    assert plain.warning is not None
    assert plain.warning.startswith("narrow range: values from 0 to 1008 of 0 to 65535")
    stretched = decoded(data, value_range="data").pixels[..., 0]
    np.testing.assert_array_equal(stretched, np.floor(dim() * (255 / dim().max()) + 0.5))
    cut = decoded(data, value_range=(100, 600)).pixels[..., 0]
    expected = np.clip(np.floor((dim().astype(float) - 100) * (255 / 500) + 0.5), 0, 255)
    np.testing.assert_array_equal(cut, expected)
    assert decoded(encode(Image.fromarray(GREY16), kind)).warning is None


def test_float_samples_have_a_meaning_where_a_range_is_given() -> None:
    values = np.linspace(-1, 3, 37 * 53).reshape(37, 53).astype(np.float32)
    values[0, 0] = np.nan
    found = decoded(tiff(values), value_range=(0, 1)).pixels[..., 0]
    expected = np.clip(np.floor(np.nan_to_num(values).astype(float) * 255 + 0.5), 0, 255)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("colour", ["RGB", "RGBA"])
def test_sixteen_bit_colour_pngs_are_stretched_too(colour: str) -> None:
    values = (picture().astype(np.uint16) * 4)[..., ::-1]
    if colour == "RGBA":
        values = np.dstack([values, np.full(values.shape[:2], 65535, np.uint16)])
    data = cv2.imencode(".png", values)[1].tobytes()
    assert kinds(data) == ["narrow range"]
    p = picture().astype(float)
    expected = np.floor((p - p.min()) * (255 / (p.max() - p.min())) + 0.5)
    np.testing.assert_array_equal(decoded(data, value_range="data").pixels, expected)


# -- frames


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_frames_are_counted(kind: str) -> None:
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (50, 150, 250)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert decoded(data).frames == 3
    assert decoded(encode(frames[0], kind)).frames == 1

"""Formats whose decoders are installed on request: HEIF, JPEG XL, DICOM, camera RAW."""

from __future__ import annotations

import importlib
import io
import struct
import warnings as python_warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.errors import TooLarge, Undecodable, Unsupported
from workers.images.pixels import (
    DecodedImage,
    as_rgb,
    check_pixels,
    profile_warning,
    silence_pillow,
    to_8_bits,
    upright,
    whole_image,
)
from workers.images.preprocessing import ValueRange
from workers.images.signatures import jpeg_xl_size

# What LibRaw calls flip, as an EXIF orientation.
_FLIPS = {0: 1, 3: 3, 5: 8, 6: 6}
_DEFLATED = "1.2.840.10008.1.2.1.99"  # the transfer syntax that deflates the header too
_PROBE_NBYTES, _PIXEL_NBYTES, _HEADER_NBYTES, _PIECE_NBYTES = 1 << 28, 16, 1 << 24, 1 << 20
_BEHIND_NBYTES = 1 << 20  # for what may follow the pixels, such as signatures
# Columns, rows, samples a pixel, bits a sample, frames: what counts where they are not stated.
_SIZE_TAGS = {0x00280011: 0, 0x00280010: 0, 0x00280002: 1, 0x00280100: 8, 0x00280008: 1}
_PIXEL_DATA = (0x7FE00008, 0x7FE00009, 0x7FE00010)


def _package(name: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise Unsupported(f"{what}: install labelfleet[{extra}]") from exc


def decode_extra(
    kind: str, data: bytes, max_pixels: int, value_range: ValueRange = "full"
) -> DecodedImage:
    """Decode an image in one of these formats.

    Raises:
        Unsupported: its decoder is not installed; the message says which extra brings it.
    """
    if kind == "HEIF":
        return decode_heif_frame(data, 0, max_pixels)
    if kind == "JPEG XL":
        return _decode_jpeg_xl(data, max_pixels)
    if kind == "DICOM":
        return decode_dicom_frame(data, 0, max_pixels, value_range)
    return _decode_camera_raw(data, max_pixels)


def probe_extra(kind: str, data: bytes, number: int = 1) -> tuple[int, int, int]:
    """(width, height, orientation) of a frame from the header. Raises as ``decode_extra``."""
    if kind == "HEIF":
        heif = _package("pillow_heif", "heif", "HEIF")
        return (*_heif_picture(heif.open_heif(data), number - 1).size, 1)
    if kind == "JPEG XL":
        return (*_sized_jpeg_xl(data), 1)
    if kind == "DICOM":
        header = _read_dicom(data, None)
        return int(header.Columns), int(header.Rows), 1
    rawpy = _package("rawpy", "raw", "camera RAW")
    with rawpy.imread(io.BytesIO(data)) as raw:
        width, height, orientation = _raw_size(raw)
        return (height, width, orientation) if orientation >= 5 else (width, height, orientation)


def heif_frames(data: bytes) -> int:
    """Return how many pictures a HEIF has, thumbnails and depth maps not counted."""
    return len(_package("pillow_heif", "heif", "HEIF").open_heif(data))


def decode_heif_frame(data: bytes, index: int, max_pixels: int) -> DecodedImage:
    """Return a picture: 0 is the primary one, then the others in the file's order.

    Raises:
        Undecodable: there is no such picture, or it is damaged.
    """
    heif = _package("pillow_heif", "heif", "HEIF")
    silence_pillow()
    try:
        file = heif.open_heif(data, convert_hdr_to_8bit=True)
        picture = _heif_picture(file, index)
        width, height = picture.size
        check_pixels(width, height, max_pixels)
        image = picture.to_pillow()  # libheif has turned it; EXIF must not turn it again
    except (ValueError, OSError, RuntimeError, SyntaxError, EOFError) as exc:
        raise Undecodable(f"damaged HEIF: {exc}") from exc
    warnings = profile_warning(image.info.get("icc_profile"))
    return whole_image(np.asarray(image.convert("RGB")), 1, len(file), warnings)


def _heif_picture(file: Any, index: int) -> Any:
    order = sorted(range(len(file)), key=lambda n: n != file.primary_index)
    if index >= len(order):
        raise Undecodable(f"damaged HEIF: no picture {index + 1}")
    return file[order[index]]


def _open_jpeg_xl(data: bytes) -> Image.Image:
    plugin = _package("pillow_jxl.JpegXLImagePlugin", "jxl", "JPEG XL")
    silence_pillow()
    image: Image.Image = plugin.JXLImageFile(io.BytesIO(data))
    return image


def _sized_jpeg_xl(data: bytes) -> tuple[int, int]:
    """(width, height) upright, from the header: opening a file would decode it."""
    _package("pillow_jxl.JpegXLImagePlugin", "jxl", "JPEG XL")
    return jpeg_xl_size(data)


def _decode_jpeg_xl(data: bytes, max_pixels: int) -> DecodedImage:
    check_pixels(*_sized_jpeg_xl(data), max_pixels)
    image = _open_jpeg_xl(data)
    check_pixels(*image.size, max_pixels)
    image.load()
    frames = int(getattr(image, "n_frames", 1))
    warnings = profile_warning(image.info.get("icc_profile"))
    return whole_image(np.asarray(image.convert("RGB")), 1, frames, warnings)


def _check_inflated(data: bytes, max_pixels: int | None) -> None:
    """Raise TooLarge for a deflated DICOM file of more bytes than its own header asks for.

    The bytes are not kept, but for the header. It may not ask for more pixels than ``max_pixels``
    a frame; None: 256 MiB in all.

    The file header is read by pydicom's own functions: where a second parser disagreed about its
    end or its transfer syntax, pydicom would inflate without a limit after all.
    """
    reader = _package("pydicom.filereader", "dicom", "DICOM")
    file = io.BytesIO(data)
    reader.read_preamble(file, False)
    header = reader._read_file_meta_info(file)
    reader._read_command_set_elements(file)
    if header.get("TransferSyntaxUID") != _DEFLATED:
        return
    end = file.tell()
    most = _PROBE_NBYTES if max_pixels is None else _asked_for(data[end:], max_pixels)
    stream, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for at in range(end, len(data), _PIECE_NBYTES):
        piece = data[at : at + _PIECE_NBYTES]
        while piece and not stream.eof:
            total += len(stream.decompress(piece, _PIECE_NBYTES))
            piece = stream.unconsumed_tail
            if total > most:
                raise TooLarge(f"deflated DICOM of more than {most} bytes")


def _asked_for(deflated: bytes, max_pixels: int) -> int:
    """Return how many bytes the header of a deflated DICOM asks for, itself included.

    A header of more than 1 MiB is not looked at: 16 bytes a pixel and 16 MiB are the limit.
    """
    reader = _package("pydicom.filereader", "dicom", "DICOM")
    most = _PIXEL_NBYTES * max_pixels
    head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(deflated, _BEHIND_NBYTES)
    file = io.BytesIO(head)
    try:
        found = reader.read_dataset(
            file, is_implicit_VR=False, is_little_endian=True, specific_tags=list(_SIZE_TAGS),
            stop_when=lambda tag, vr, length: tag in _PIXEL_DATA,
        )  # fmt: skip
        columns, rows, samples, bits, frames = (
            int(found[tag].value) if tag in found else otherwise
            for tag, otherwise in _SIZE_TAGS.items()
        )
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, struct.error,
            NotImplementedError):  # fmt: skip  # pydicom will say what is wrong with it
        return most + _HEADER_NBYTES
    if file.tell() >= len(head) == _BEHIND_NBYTES:
        return most + _HEADER_NBYTES
    if columns and rows:
        check_pixels(columns, rows, max_pixels)
    asked = columns * rows * samples * (bits + 7) // 8 * max(1, frames)
    return file.tell() + min(most, max(0, asked)) + _BEHIND_NBYTES


def _read_dicom(data: bytes, max_pixels: int | None) -> Any:
    pydicom = _package("pydicom", "dicom", "DICOM")
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        _check_inflated(data, max_pixels)
        return pydicom.dcmread(io.BytesIO(data))


def dicom_frames(data: bytes) -> int:
    """Return how many frames the header says there are."""
    return int(_read_dicom(data, None).get("NumberOfFrames", 1) or 1)


def decode_dicom_frame(
    data: bytes, index: int, max_pixels: int, value_range: ValueRange
) -> DecodedImage:
    """Return a frame, windowed as its header says (DICOM PS3.3, C.11.2), else by its range.

    Raises:
        Unsupported: its decoder is not installed, or its samples have no agreed meaning.
        Undecodable: there is no such frame.
    """
    dataset = _read_dicom(data, max_pixels)
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if index >= max(1, frames):
        raise Undecodable(f"damaged DICOM: no frame {index + 1}")
    if "PixelData" not in dataset:
        raise Unsupported("DICOM without an image (no PixelData)")
    check_pixels(int(dataset.Columns), int(dataset.Rows), max_pixels)
    pixels = _package("pydicom.pixels", "dicom", "DICOM")
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        try:
            samples = np.asarray(pixels.pixel_array(dataset, index=index))
        except (RuntimeError, NotImplementedError, ImportError) as exc:
            syntax = dataset.file_meta.TransferSyntaxUID.name
            raise Unsupported(f"DICOM, {syntax}: {' '.join(str(exc).split())[:150]}") from exc
        warnings: list[str] = []
        rgb = _windowed(pixels, dataset, samples, value_range, warnings)
    return whole_image(rgb, 1, frames, warnings)


def _windowed(
    pixels: Any, dataset: Any, samples: NDArray[Any], value_range: ValueRange, warnings: list[str]
) -> NDArray[np.uint8]:
    model = dataset.PhotometricInterpretation
    bits = int(dataset.BitsStored)
    if model == "PALETTE COLOR":
        colour = pixels.apply_color_lut(samples, dataset)
        return as_rgb(to_8_bits(colour, "full", bits=colour.dtype.itemsize * 8, warnings=[]))
    if model not in ("MONOCHROME1", "MONOCHROME2"):  # pixel_array has made YBR RGB
        if samples.ndim != 3 or samples.dtype != np.uint8:
            raise Unsupported(f"DICOM, {model} of {bits} bits")
        return as_rgb(samples)
    values = np.asarray(pixels.apply_modality_lut(samples, dataset), np.float64)
    if value_range == "full" and "WindowWidth" in dataset:
        low, high = _window(dataset)
        grey = to_8_bits(values, (low, high), bits=None, warnings=warnings)
    elif value_range == "full":
        low = float(-(1 << bits - 1)) if dataset.PixelRepresentation else 0.0
        shifted = (samples.astype(np.int64) - int(low)).astype(np.uint32)
        grey = to_8_bits(shifted, "full", bits=bits, warnings=warnings if bits > 8 else [])
        if bits < 8:
            grey = (shifted * 255 // ((1 << bits) - 1)).astype(np.uint8)
    else:
        grey = to_8_bits(values, value_range, bits=None, warnings=warnings)
    return as_rgb(255 - grey if model == "MONOCHROME1" else grey)


def _window(dataset: Any) -> tuple[float, float]:
    """Return the values that the first window shows as black and white."""
    center, width = dataset.WindowCenter, dataset.WindowWidth
    if not isinstance(center, (int, float)):
        center, width = center[0], width[0]
    center, width = float(center), max(1.0, float(width))
    return center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2


def _raw_size(raw: Any) -> tuple[int, int, int]:
    sizes = raw.sizes
    return int(sizes.width), int(sizes.height), _FLIPS.get(int(sizes.flip), 1)


def _decode_camera_raw(data: bytes, max_pixels: int) -> DecodedImage:
    """Return the raw image developed with the camera's white balance, never the thumbnail."""
    rawpy = _package("rawpy", "raw", "camera RAW")
    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            width, height, orientation = _raw_size(raw)
            check_pixels(width, height, max_pixels)
            pixels = raw.postprocess(
                use_camera_wb=True, output_bps=8, user_flip=0, no_auto_bright=False
            )
    except rawpy.LibRawFileUnsupportedError as exc:
        raise Unsupported(f"camera RAW that LibRaw does not know: {exc}") from exc
    except rawpy.LibRawError as exc:
        raise Undecodable(f"damaged camera RAW: {exc}") from exc
    return whole_image(upright(as_rgb(pixels), orientation), orientation, 1, [])

"""Which format a file is, told by its first bytes; names and suffixes are not believed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

Format = Literal["JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF"]

_PNG = b"\x89PNG\r\n\x1a\n"
_STARTS: tuple[tuple[bytes, Format], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (_PNG, "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)
_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "MP4 or QuickTime video"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\1\0", "icon"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (128, b"DICM", "DICOM"),
    (0, b"%PDF", "PDF"),
    (0, b"qoif", "QOI"),
    (0, b"P5", "PGM"),
    (0, b"P6", "PPM"),
    (0, b"<svg", "SVG"),
)
# What the pixels depend on; XMP (an iTXt chunk) and colour profiles are not among it.
_PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"})


def format_of(data: bytes) -> Format | None:
    """The format that labelfleet decodes, or None for everything else."""
    for start, kind in _STARTS:
        if data.startswith(start):
            return kind
    return "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def describe_foreign(data: bytes) -> tuple[bool, str]:
    """(is it a known format that is not labelled, what to tell a person about these bytes)."""
    for at, magic, name in _FOREIGN:
        if data.startswith(magic, at):
            return True, f"{name} is not a format that is labelled"
    if not data[:4096].strip(b"\0"):
        return False, "not an image: it begins with zeros"
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        return False, f"not an image but text, beginning {head[:32].decode('ascii', 'replace')!r}"
    return False, f"not an image: it begins with the bytes {data[:8].hex(' ')}"


def webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from a WebP header (RFC 9649); None where there is none."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    if chunk == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def webp_exif(data: bytes) -> bytes:
    """The EXIF chunk's payload, empty where there is none."""
    at = 12
    while at + 8 <= len(data):
        nbytes = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return data[at + 8 : at + 8 + nbytes]
        at += 8 + nbytes + nbytes % 2
    return b""


def png_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels from a PNG's first chunk; None where that is not IHDR."""
    if data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def png_exif(data: bytes) -> bytes:
    """The eXIf chunk's payload, wherever it stands; empty where there is none."""
    for name, start, end in _png_chunks(data):
        if name == b"eXIf":
            return data[start + 8 : end - 4]
    return b""


def without_metadata(png: bytes) -> bytes:
    """The same PNG with only the chunks its first frame needs."""
    kept = [png[start:end] for name, start, end in _png_chunks(png) if name in _PNG_CHUNKS]
    return b"".join([_PNG, *kept])


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk, length and checksum included."""
    at = len(_PNG)
    while at + 8 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8], at, end
        at = end

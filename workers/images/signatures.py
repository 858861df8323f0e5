"""Detect a file's format from its first bytes; names and suffixes are ignored.

A JPEG XL's size is read here too, since its decoder gives it only after decoding (ISO/IEC 18181-1,
SizeHeader; 18181-2, boxes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

from storage.errors import Undecodable, Unsupported

Format = Literal[
    "JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF", "AVIF", "JPEG 2000", "PNM", "Photoshop", "TGA",
    "HEIF", "JPEG XL", "DICOM", "camera RAW",
]  # fmt: skip

_STARTS: tuple[tuple[int, bytes, Format], ...] = (
    (0, b"\xff\xd8", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"II*\0\x10\0\0\0CR", "camera RAW"),  # Canon CR2
    (0, b"IIRO", "camera RAW"),  # Olympus ORF
    (0, b"IIRS", "camera RAW"),
    (0, b"MMOR", "camera RAW"),
    (0, b"IIU\0", "camera RAW"),  # Panasonic RW2
    (0, b"FUJIFILMCCD-RAW", "camera RAW"),
    (0, b"\0MRM", "camera RAW"),  # Minolta MRW
    (0, b"FOVb", "camera RAW"),  # Sigma X3F
    (4, b"ftypcrx ", "camera RAW"),  # Canon CR3
    (0, b"II*\0", "TIFF"),  # or one of the many camera RAW formats inside TIFF; see tiff/
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),  # BigTIFF
    (0, b"MM\0+", "TIFF"),
    (0, b"BM", "BMP"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftyphev", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (128, b"DICM", "DICOM"),
)
_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "MP4 or QuickTime video"),
    (0, b"\0\0\1\0", "icon"),
    (0, b"\0\0\2\0", "cursor"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"%PDF", "PDF"),
    (0, b"qoif", "QOI"),
    (0, b"P7\n", "PAM"),
    (0, b"<svg", "SVG"),
    (0, b"icns", "Apple icon"),
    (0, b"FORM", "IFF"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"\x0a\x05\x01", "PCX"),
    (0, b"\x01\xda", "SGI"),
    (0, b"\x59\xa6\x6a\x95", "Sun raster"),
    (0, b"PK\3\4", "ZIP"),
    (0, b"DDS ", "DirectDraw surface"),
)


def format_of(data: bytes) -> Format | None:
    """Return the format that labelfleet decodes, or None for everything else."""
    for at, magic, kind in _STARTS:
        if data.startswith(magic, at):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and data[8:12] in (b"mif1", b"msf1", b"miaf"):
        # Either codec's; the other brands say which.
        brands = data[16 : int.from_bytes(data[:4], "big")]
        return "AVIF" if b"avif" in brands or b"avis" in brands else "HEIF"
    if data[:1] == b"P" and data[1:2] in b"123456fF" and data[2:3] in b" \t\r\n#":
        return "PNM"
    return "TGA" if _is_tga(data) else None


def _is_tga(data: bytes) -> bool:
    """TGA has no signature: a header in which every field is one that the format allows."""
    if len(data) < 18:
        return False
    mapped, kind, depth = data[1], data[2], data[16]
    width, height = int.from_bytes(data[12:14], "little"), int.from_bytes(data[14:16], "little")
    if kind not in (1, 2, 3, 9, 10, 11) or not width or not height or data[17] & 0xC0:
        return False
    if kind in (1, 9):
        if mapped != 1 or depth != 8 or data[7] not in (8, 15, 16, 24, 32):
            return False
    elif (
        mapped or any(data[3:8]) or depth not in ((8, 16) if kind in (3, 11) else (15, 16, 24, 32))
    ):
        return False
    mapped_nbytes = int.from_bytes(data[5:7], "little") * ((data[7] + 7) // 8)
    if kind in (9, 10, 11):
        return len(data) > 18 + data[0] + mapped_nbytes
    return len(data) >= 18 + data[0] + mapped_nbytes + width * height * ((depth + 7) // 8)


def describe_foreign(data: bytes) -> tuple[bool, str]:
    """Return (whether it is a known format that is not labelled, what to tell a person)."""
    for at, magic, name in _FOREIGN:
        if data.startswith(magic, at):
            return True, f"{name} is not a format that is labelled"
    if not data[:4096].strip(b"\0"):
        return False, "not an image: it begins with zeros"
    head = data[:256].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return False, "not an image but a Git LFS pointer; fetch the file with `git lfs pull`"
    if head.startswith((b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in data[:4096].lower():
        return True, "SVG is not a format that is labelled"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        return False, f"not an image but text, beginning {head[:32].decode('ascii', 'replace')!r}"
    return False, f"not an image: it begins with the bytes {data[:8].hex(' ')}"


def bmp_masks(data: bytes) -> tuple[int, ...] | None:
    """Return a BMP's (red, green, blue) bit masks; None where it has none, or Pillow's."""
    header, bits = int.from_bytes(data[14:18], "little"), int.from_bytes(data[28:30], "little")
    if header < 40 or bits not in (16, 32) or int.from_bytes(data[30:34], "little") not in (3, 6):
        return None
    return struct.unpack_from("<III", data, 54) if len(data) >= 66 else None


def bmp_warnings(data: bytes) -> list[str]:
    """Return warnings where a BMP's header contradicts its bytes but Pillow still reads it."""
    header, bits = int.from_bytes(data[14:18], "little"), int.from_bytes(data[28:30], "little")
    compression = int.from_bytes(data[30:34], "little")
    if header < 40 or len(data) < 54:
        return []
    start, colours = (int.from_bytes(data[at : at + 4], "little") for at in (10, 46))
    found = []
    if bits <= 8 and colours > 1 << bits:
        found.append(f"corrupt data: a palette of {colours} colours for {bits} bits a pixel")
    if start < 14 + header:
        found.append(f"corrupt data: its pixels are said to begin at byte {start}, in the header")
    width, height = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in (18, 22))
    nbytes = (width * bits + 31) // 32 * 4 * abs(height)
    if compression in (0, 3, 6) and max(start, 14 + header) + nbytes > len(data):
        missing = max(start, 14 + header) + nbytes - len(data)
        found.append(f"premature end: {missing} bytes of the last row are missing")
    return found


def gif_warnings(data: bytes) -> list[str]:
    """Return what lies between a GIF's blocks up to its first image, where none should (GIF89a)."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    while at + 2 < len(data) and data[at] == 0x21:  # an extension: label, then sub-blocks
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    if at < len(data) and data[at] != 0x2C:
        return ["corrupt data: stray bytes between its blocks"]
    return []


_PSD_MODES = {
    0: "bitmap", 1: "grey", 2: "indexed", 3: "RGB", 4: "CMYK", 7: "multichannel", 8: "duotone",
    9: "Lab",
}  # fmt: skip


def check_psd(data: bytes) -> None:
    """Raise Unsupported for a Photoshop file whose composite is missing, or not of 8 bits."""
    if len(data) < 26:
        raise Undecodable("truncated Photoshop file: no header")
    version, channels, depth, mode = (
        int.from_bytes(data[a:b], "big") for a, b in ((4, 6), (12, 14), (22, 24), (24, 26))
    )
    kind = _PSD_MODES.get(mode, f"mode {mode}")
    if version != 1 or mode in (7, 9) or (depth != 8 and (depth, mode) != (1, 0)):
        raise Unsupported(f"Photoshop version {version}, {kind}, {depth} bits, {channels} channels")
    # Image resource 1057, version info: whether the composite is a real one.
    at = data.find(b"8BIM\x04\x21\0\0")
    if at >= 0 and data[at + 12 + 4 : at + 12 + 5] == b"\0":
        raise Unsupported("Photoshop file saved without its composite (maximise compatibility)")


def bytes_after_end(kind: Format | str, data: bytes) -> int:
    """Return how many bytes follow the image's own end, for formats that have one."""
    if kind == "WebP":
        nbytes = 8 + int.from_bytes(data[4:8], "little")
        return max(0, len(data) - nbytes - nbytes % 2)
    return 0


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
    """Return the EXIF chunk's payload, empty where there is none."""
    at = 12
    while at + 8 <= len(data):
        nbytes = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return data[at + 8 : at + 8 + nbytes]
        at += 8 + nbytes + nbytes % 2
    return b""


_CODESTREAM = b"\xff\x0a"
_CONTAINER = b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"
_HEADER_NBYTES = 32  # more than signature, SizeHeader and orientation take
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
_WIDTHS = (9, 13, 18, 30)  # of a side that is not a multiple of 8 up to 256


def jpeg_xl_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of the upright image, as a decoder gives it.

    Raises Undecodable where there is no header.
    """
    head = data if data.startswith(_CODESTREAM) else b"".join(_codestream(data))
    if not head.startswith(_CODESTREAM) or len(head) < 4:
        raise Undecodable("damaged JPEG XL: no codestream header")
    bits = _Bits(head[2:_HEADER_NBYTES])
    width, height = _size(bits)
    return (height, width) if _orientation(bits) >= 5 else (width, height)


def _codestream(data: bytes) -> Iterator[bytes]:
    """Yield the beginnings of the codestream's parts in a container, as far as a header needs."""
    at, found = len(_CONTAINER), 0
    if not data.startswith(_CONTAINER):
        return
    while at + 8 <= len(data) and found < _HEADER_NBYTES:
        size, kind, skip = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, skip = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        end = len(data) if size == 0 else at + size  # 0: to the end of the file
        if end < at + skip:
            return
        if kind in (b"jxlc", b"jxlp"):
            start = at + skip + (4 if kind == b"jxlp" else 0)
            part = data[start : min(end, start + _HEADER_NBYTES)]
            found += len(part)
            yield part
        at = end


class _Bits:
    """Fields of a codestream: the least significant bit of a byte comes first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self._left:
            raise Undecodable("damaged JPEG XL: its header is cut off")
        taken = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return taken


def _size(bits: _Bits) -> tuple[int, int]:
    small = bool(bits.take(1))
    height = _side(bits, small)
    ratio = bits.take(3)
    if ratio == 0:
        return _side(bits, small), height
    times, over = _RATIOS[ratio]
    return height * times // over, height


def _side(bits: _Bits, small: bool) -> int:
    return 8 * (bits.take(5) + 1) if small else bits.take(_WIDTHS[bits.take(2)]) + 1


def _orientation(bits: _Bits) -> int:
    """Return the orientation, 1 to 8, from the beginning of ImageMetadata."""
    all_default = bits.take(1)
    if all_default or not bits.take(1):  # the second: whether there are extra fields
        return 1
    return bits.take(3) + 1

"""The fields of tar headers: pure functions from bytes to values.

Formats: v7, ustar, GNU (base-256 numbers) and PAX (``path``, ``linkpath``, ``size``), after IEEE
Std 1003.1, "pax", and the GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

BLOCK = 512
MAX_NAME = 1 << 16  # bytes of a name or link target that are kept

MemberKind = Literal[
    "file", "symlink", "hardlink", "directory", "device", "fifo", "sparse", "other"
]
_KINDS: dict[bytes, MemberKind] = {
    b"\0": "file", b"0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink",
    b"3": "device", b"4": "device", b"5": "directory", b"6": "fifo", b"S": "sparse",
}  # fmt: skip
_WITHOUT_BODY = frozenset({"hardlink", "symlink", "device", "directory", "fifo"})
_PAX_USED = frozenset({b"path", b"linkpath", b"size", b"GNU.sparse.name"})
_PAX_TEXTS = _PAX_USED - {b"size"}


_NEWLINE = 10


class Damaged(Exception):
    """A header that cannot come from a tar program; the text names the problem."""


class TarMember(NamedTuple):
    """One member as its headers describe it.

    Attributes:
        name: raw bytes, whatever they say; they are a label and never a path here.
        kind: only ``file`` has a body that is an image.
        offset: where the body begins in the (uncompressed) archive.
        nbytes: body size as announced, nothing of it checked yet.
        target: where a link points, raw bytes.
    """

    name: bytes
    kind: MemberKind
    offset: int
    nbytes: int
    target: bytes = b""

    @property
    def body_blocks(self) -> int:
        """How many blocks follow the header; links and the like have none whatever they say."""
        return 0 if self.kind in _WITHOUT_BODY else -(-self.nbytes // BLOCK)


def is_zero(block: bytes) -> bool:
    """Return whether the block is all zeros: an end-of-archive block."""
    return not block.strip(b"\0")


def checksum_fits(header: bytes) -> bool:
    """Return whether the checksum matches, with unsigned or (old writers) signed bytes."""
    try:
        stated = int(header[148:156].split(b"\0", 1)[0].strip() or b"-1", 8)
    except ValueError:
        return False
    # The low half of an Adler-32 (RFC 1950) is 1 + the sum, modulo 65521: more than a half block
    # can have, without a Python integer for each byte.
    rest = header[:148] + header[156:BLOCK]
    unsigned = 254 + (zlib.adler32(rest[:252]) & 0xFFFF) + (zlib.adler32(rest[252:]) & 0xFFFF)
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in rest)


def body_size(header: bytes) -> int:
    """Return the size field: octal text, or base-256 where its first bit is set (GNU)."""
    field = header[124:136]
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big")
        if field[0] != 0x80 or value >= 1 << 63:
            raise Damaged("its header announces an impossible size")
        return value
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit() or digits.strip(b"01234567"):
        raise Damaged("the size in its header is not an octal number")
    return int(digits, 8)


def parse_pax(text: bytes) -> dict[bytes, bytes]:
    """The records of one PAX header that matter here: ``<length> <key>=<value>\\n`` each."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(text):
        space = text.find(b" ", at, at + 20)
        end = at + (_decimal(text[at:space]) if space > at else 0)
        key, equals, value = text[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(text) or end == at or not equals or text[end - 1] != _NEWLINE:
            raise Damaged("its extension header is damaged")
        # Extension headers have no checksum. Neither a keyword nor a name can hold a NUL; with one
        # in "path", the member would take another name and might count as no image.
        if b"\0" in key or (key in _PAX_TEXTS and b"\0" in value):
            raise Damaged("its extension header is damaged")
        if key in _PAX_USED:
            found[key] = value[:MAX_NAME]
        elif key.startswith(b"GNU.sparse."):
            found[b"GNU.sparse"] = b"yes"
        at = end
    return found


def _decimal(field: bytes) -> int:
    if not field.isdigit() or len(field) > 18:
        raise Damaged("its extension header holds no number where one belongs")
    return int(field)


def describe(
    header: bytes, pax: dict[bytes, bytes], long_name: bytes, long_target: bytes, offset: int
) -> TarMember:
    """Return the member that a header and the extension headers before it make.

    Args:
        pax: from ``parse_pax``, of all that apply.
        long_name, long_target: from GNU's ``L`` and ``K`` headers, else empty.
        offset: where the body begins.
    """
    sparse = b"GNU.sparse" in pax or b"GNU.sparse.name" in pax
    return TarMember(
        pax.get(b"GNU.sparse.name") or pax.get(b"path") or long_name or _short_name(header),
        "sparse" if sparse else _KINDS.get(header[156:157], "other"),
        offset,
        _decimal(pax[b"size"]) if b"size" in pax else body_size(header),
        pax.get(b"linkpath") or long_target or text_field(header[157:257]),
    )


def long_text(body: bytes) -> bytes:
    """Return the text in the body of a GNU ``L`` or ``K`` header.

    Raises Damaged where more than the closing NUL is missing: a part of it was zeroed.
    """
    text = body.split(b"\0", 1)[0]
    if len(text) < len(body) - 1:
        raise Damaged("its extension header is damaged")
    return text[:MAX_NAME]


def text_field(field: bytes) -> bytes:
    """Return the field up to its first NUL."""
    return field.split(b"\0", 1)[0][:MAX_NAME]


def _short_name(header: bytes) -> bytes:
    name = text_field(header[:100])
    # GNU's own magic is "ustar  ": it keeps times where POSIX has the prefix.
    prefix = text_field(header[345:500]) if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name

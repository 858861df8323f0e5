"""Decode names in zips, whose encoding differs between zip programs.

A name is UTF-8 where its flag says so (APPNOTE.TXT 4.4.4, bit 11) or an Info-ZIP Unicode Path
field repeats it (4.6.9, 0x7075). Else it is in the code page of the machine that wrote it: UTF-8
where it reads as such, Japanese (cp932) where it reads as kana or kanji, else cp437.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

_UTF8_FLAG = 0x800
_UNICODE_PATH = 0x7075
_DOS, _NTFS = 0, 10

Encoding = Literal["stated", "utf-8", "cp932", "cp437"]


@dataclass(frozen=True, slots=True)
class ZipName:
    """A member's name with '/' between its parts, and where its letters come from: ``stated`` by
    the zip (or plain ASCII), else guessed."""

    text: str
    encoding: Encoding


def zip_name(member: zipfile.ZipInfo) -> ZipName:
    """Return the name of a member as ``zipfile`` lists it (without ``metadata_encoding``)."""
    original = member.orig_filename
    if member.flag_bits & _UTF8_FLAG:
        return ZipName(_slashed(original, member), "stated")
    raw = original.encode("cp437", "replace")
    stated = _unicode_path(member.extra, raw)
    if stated is not None or raw.isascii():
        return ZipName(_slashed(stated or original, member), "stated")
    text, encoding = _guessed(raw)
    return ZipName(_slashed(text, member), encoding)


def _slashed(text: str, member: zipfile.ZipInfo) -> str:
    """Old Windows programs write backslashes, against the rules; on Unix they may be meant."""
    if "/" not in text and member.create_system in (_DOS, _NTFS):
        return text.replace("\\", "/")
    return text


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    for kind, field in _fields(extra):
        if kind == _UNICODE_PATH and len(field) > 5 and field[0] == 1:
            (crc,) = struct.unpack_from("<L", field, 1)
            if crc == zlib.crc32(raw):  # else the name was changed by a program without the field
                with suppress(UnicodeDecodeError):
                    return field[5:].decode("utf-8")
    return None


def _fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        kind, nbytes = struct.unpack_from("<HH", extra, at)
        yield kind, extra[at + 4 : at + 4 + nbytes]
        at += 4 + nbytes


def _guessed(raw: bytes) -> tuple[str, Encoding]:
    with suppress(UnicodeDecodeError):
        return raw.decode("utf-8"), "utf-8"
    with suppress(UnicodeDecodeError):
        text = raw.decode("cp932")
        foreign = [letter for letter in text if not letter.isascii()]
        if all(_is_japanese(letter) for letter in foreign):
            return text, "cp932"
    return raw.decode("cp437"), "cp437"


def _is_japanese(letter: str) -> bool:
    """Kana, kanji, their punctuation and full-width forms; half-width kana are a single byte, which
    an accented letter of another code page is too."""
    return (
        "\u3000" <= letter <= "\u30ff"
        or "\u4e00" <= letter <= "\u9fff"
        or ("\uff01" <= letter <= "\uff5e")
    )

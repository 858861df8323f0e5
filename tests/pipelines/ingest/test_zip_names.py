"""Names in zips as different programs write them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import pytest

from pipelines.ingest.zip_names import ZipName, zip_name


def read_back(
    raw: bytes, *, utf8_flag: bool = False, extra: bytes = b"", system: int = 0
) -> ZipName:
    """The name of the only member of a zip whose name has these bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        member = zipfile.ZipInfo("x" * len(raw))
        member.extra, member.create_system = extra, system
        made.writestr(member, b"body")
    data = file.getvalue().replace(b"x" * len(raw), raw)
    if utf8_flag:
        for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            where = data.index(mark) + at
            flags = struct.unpack_from("<H", data, where)[0] | 0x800
            data = data[:where] + struct.pack("<H", flags) + data[where + 2 :]
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return zip_name(opened.infolist()[0])


def unicode_path(raw: bytes, name: str) -> bytes:
    field = b"\1" + struct.pack("<L", zlib.crc32(raw)) + name.encode()
    return struct.pack("<HH", 0x7075, len(field)) + field


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"a/b.jpg", ZipName("a/b.jpg", "stated")),
        ("größe/ü.jpg".encode(), ZipName("größe/ü.jpg", "utf-8")),
        ("größe/ü.jpg".encode("cp437"), ZipName("größe/ü.jpg", "cp437")),
        ("日本語/テスト.jpg".encode("cp932"), ZipName("日本語/テスト.jpg", "cp932")),
        ("日本語.jpg".encode(), ZipName("日本語.jpg", "utf-8")),
        (rb"folder\sub\a.jpg", ZipName("folder/sub/a.jpg", "stated")),
    ],
)
def test_names_without_the_flag(raw: bytes, expected: ZipName) -> None:
    assert read_back(raw) == expected


def test_the_flag_and_the_unicode_field_decide() -> None:
    assert read_back("é.jpg".encode(), utf8_flag=True) == ZipName("é.jpg", "stated")
    raw = "\x82.jpg".encode("latin-1")
    assert read_back(raw, extra=unicode_path(raw, "日.jpg")) == ZipName("日.jpg", "stated")
    # The field of another name is that of a program that renamed the member without knowing it.
    assert read_back(raw, extra=unicode_path(b"old", "日.jpg")) == ZipName("é.jpg", "cp437")


def test_backslashes_of_unix_are_part_of_the_name() -> None:
    assert read_back(rb"a\b.jpg", system=3).text == rb"a\b.jpg".decode()

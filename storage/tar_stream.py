"""A forward-only tar reader for archives nobody vouches for; nothing is ever extracted.

Python's ``tarfile`` keeps every member in memory, reads an extension header of any announced
size whole, recurses on chains of them, and reads only the first member of a gzip file. This
reader keeps one member, caps what it holds, and tells a cut archive from a finished one.

Formats: v7, ustar, GNU (long names, base-256 sizes) and PAX (``path``, ``linkpath``, ``size``),
after IEEE Std 1003.1 (pax) and the GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol, cast

from storage.errors import Interrupted, SourceError, SourceTruncated

BLOCK = 512
_CHUNK = 1 << 20
_MAX_EXTENSION = 4 << 20  # a long name or a PAX header; real ones have some hundred bytes
_MAX_NAME = 1 << 16

MemberKind = Literal[
    "file", "symlink", "hardlink", "directory", "device", "fifo", "sparse", "other"
]
_KINDS: dict[bytes, MemberKind] = {
    b"\0": "file", b"0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink",
    b"3": "device", b"4": "device", b"5": "directory", b"6": "fifo", b"S": "sparse",
}  # fmt: skip
_WITHOUT_BODY = frozenset({"hardlink", "symlink", "device", "directory", "fifo"})


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TarMember:
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


class _Cut(Exception):
    """The archive ended, or stopped making sense, at ``offset``."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(why)
        self.why, self.offset = why, offset


class _Prefixed:
    """A stream whose first two bytes can be looked at before they are read."""

    def __init__(self, stream: _Readable) -> None:
        self._stream = stream
        self.prefix = stream.read(2)
        if len(self.prefix) == 1:
            self.prefix += stream.read(1)
        self._held = self.prefix

    def read(self, size: int, /) -> bytes:
        if not self._held:
            return self._stream.read(size)
        given, self._held = self._held[:size], self._held[size:]
        return given


def _gunzip(stream: _Readable) -> _Readable:
    # Opened for reading, GzipFile asks nothing but read() of the file it is given.
    return gzip.GzipFile(fileobj=cast(BinaryIO, stream), mode="rb")


class TarStream:
    """Iterates over members; ``read_body`` gives the current one's bytes.

    Args:
        stream: the archive from its start, plain or gzip (of any number of gzip members; told
            by its first bytes, not by its name); only ``read`` is used.
        name: of the archive, for error messages.
        abort: asked at every member and megabyte; Interrupted when it says yes.

    Iterating raises:
        SourceError: not one readable tar header: this is no tar archive.
        SourceTruncated: everything before was given, and then the archive ends in the middle,
            is damaged, or lacks the end-of-archive block that every complete tar has.
        Interrupted: ``abort`` said yes.

    Blocks after the end marker are looked at too: where another archive follows (``cat a.tar
    b.tar``), its members count, as with ``tar --ignore-zeros``; anything else there is padding.
    """

    def __init__(
        self,
        stream: BinaryIO,
        *,
        name: str,
        abort: Callable[[], bool] | None = None,
    ) -> None:
        start = _Prefixed(stream)
        self.compressed = start.prefix == b"\x1f\x8b"
        self._stream: _Readable = _gunzip(start) if self.compressed else start
        self._name = name
        self._abort = abort
        self._position = 0
        self._members = 0
        self._unread = 0  # bytes of the current body and its padding not taken yet
        self._global_pax: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[TarMember]:
        try:
            yield from self._iterate()
        except _Cut as cut:
            raise self._translate(cut) from cut.__cause__

    def _iterate(self) -> Iterator[TarMember]:
        ended = False
        while True:
            self._skip_body()
            header = self._header_or_end(ended)
            if header is None:
                return
            ended = not header.strip(b"\0")
            if not ended:
                member = self._member(header)
                self._members += 1
                yield member

    def _header_or_end(self, ended: bool) -> bytes | None:
        """The next header block; all zeros at an end marker; None when the stream is over."""
        start = self._position
        try:
            header = self._read(BLOCK)
        except _Cut:
            if ended:
                return None  # padding that is no gzip any more, and the like
            raise
        if not header and not ended:
            if start == 0:
                raise _Cut("it is empty", start)
            raise _Cut("it ends without the end-of-archive block", start)
        if ended and not self._is_header(header):
            return header if header and not header.strip(b"\0") else None
        if len(header) < BLOCK:
            raise _Cut("it ends inside a header", start)
        return header

    @staticmethod
    def _is_header(block: bytes) -> bool:
        return len(block) == BLOCK and bool(block.strip(b"\0")) and _checksum_fits(block)

    def _member(self, header: bytes) -> TarMember:
        """Follow extension headers up to the one that describes a member."""
        pax: dict[str, bytes] = {}
        long_name = long_target = None
        while True:
            start = self._position - BLOCK
            if not _checksum_fits(header):
                raise _Cut("its header is damaged", start)
            kind, size = header[156:157], self._number(header[124:136], start)
            if kind in b"xX":
                pax.update(self._pax(size, start))
            elif kind == b"g":
                self._global_pax.update(self._pax(size, start))
            elif kind == b"L":
                long_name = self._extension(size, start).split(b"\0", 1)[0]
            elif kind == b"K":
                long_target = self._extension(size, start).split(b"\0", 1)[0]
            else:
                return self._described(header, self._global_pax | pax, long_name, long_target)
            header = self._read(BLOCK)
            if len(header) < BLOCK:
                raise _Cut("it ends between a member's headers", start)

    def _described(
        self,
        header: bytes,
        pax: dict[str, bytes],
        long_name: bytes | None,
        long_target: bytes | None,
    ) -> TarMember:
        start = self._position - BLOCK
        kind = _KINDS.get(header[156:157], "other")
        if kind == "sparse":
            self._skip_sparse_map(header)
        name = pax.get("GNU.sparse.name") or pax.get("path") or long_name or _short_name(header)
        if any(key.startswith("GNU.sparse.") for key in pax):
            kind = "sparse"
        nbytes = self._number(header[124:136], start)
        if "size" in pax:
            nbytes = self._decimal(pax["size"], start)
        self._unread = 0 if kind in _WITHOUT_BODY else -(-nbytes // BLOCK) * BLOCK
        target = pax.get("linkpath") or long_target or header[157:257].split(b"\0", 1)[0]
        return TarMember(name[:_MAX_NAME], kind, self._position, nbytes, target[:_MAX_NAME])

    def _skip_sparse_map(self, header: bytes) -> None:
        more = header[482] != 0
        while more:
            block = self._read(BLOCK)
            if len(block) < BLOCK:
                raise _Cut("it ends inside a sparse map", self._position)
            more = block[504] != 0
            self._check_abort()

    def read_body(self, member: TarMember) -> bytes:
        """The current member's body, in full; call once, before the next step of iteration.

        Raises SourceTruncated where the archive ends before the body does.
        """
        try:
            body = self._read(member.nbytes)
            self._unread -= len(body)
            if len(body) < member.nbytes:
                raise _Cut(f"{len(body)} of {member.nbytes} bytes are there", member.offset)
        except _Cut as cut:
            raise self._translate(cut, member.name) from cut.__cause__
        return body

    def skip_body(self, member: TarMember) -> None:
        """Pass over the current member's body; SourceTruncated where it is not all there."""
        try:
            self._skip_body()
        except _Cut as cut:
            raise self._translate(cut, member.name) from cut.__cause__

    def _skip_body(self) -> None:
        while self._unread > 0:
            skipped = len(self._read(min(self._unread, _CHUNK)))
            if not skipped:
                # A missing last padding is a cut too: the end marker is missing with it.
                raise _Cut("it ends inside a member", self._position)
            self._unread -= skipped

    def _extension(self, size: int, start: int) -> bytes:
        if size > _MAX_EXTENSION:
            raise _Cut(f"an extension header announces {size} bytes", start)
        body = self._read(-(-size // BLOCK) * BLOCK)
        if len(body) < size:
            raise _Cut("it ends inside an extension header", start)
        return body[:size]

    def _pax(self, size: int, start: int) -> dict[str, bytes]:
        """The records we use of one PAX header: ``<length> <key>=<value>\\n`` each."""
        text = self._extension(size, start)
        found: dict[str, bytes] = {}
        at = 0
        while at < len(text) and text[at] != 0:
            space = text.find(b" ", at, at + 20)
            length = self._decimal(text[at:space], start) if space > 0 else 0
            record = text[space + 1 : at + length - 1]
            key, equals, value = record.partition(b"=")
            if not equals or at + length > len(text) or space >= at + length:
                raise _Cut("an extension header is damaged", start)
            if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
                found[key.decode("ascii", "replace")[:64]] = value[:_MAX_NAME]
            at += length
        return found

    def _number(self, field: bytes, start: int) -> int:
        """Octal text, or base-256 where the first bit is set (GNU)."""
        if field[0] & 0x80:
            value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
            if field[0] != 0x80 or value >= 1 << 63:
                raise _Cut("a header announces an impossible size", start)
            return value
        digits = field.split(b"\0", 1)[0].strip()
        try:
            value = int(digits or b"0", 8)
        except ValueError as exc:
            raise _Cut("a header's size is no number", start) from exc
        if value < 0:
            raise _Cut("a header announces a negative size", start)
        return value

    @staticmethod
    def _decimal(field: bytes, start: int) -> int:
        if not field.isdigit() or len(field) > 18:
            raise _Cut("an extension header is damaged", start)
        return int(field)

    def _read(self, nbytes: int) -> bytes:
        """Up to ``nbytes`` bytes, fewer only at the end; never more memory than arrives."""
        parts: list[bytes] = []
        missing = nbytes
        while missing > 0:
            self._check_abort()
            part = self._read_part(min(missing, _CHUNK))
            if not part:
                break
            parts.append(part)
            missing -= len(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_part(self, nbytes: int) -> bytes:
        try:
            return self._stream.read(nbytes)
        except EOFError as exc:
            raise _Cut("its compressed data end in the middle", self._position) from exc
        except (gzip.BadGzipFile, zlib.error) as exc:
            raise _Cut(f"its compressed data are damaged ({exc})", self._position) from exc

    def _check_abort(self) -> None:
        if self._abort is not None and self._abort():
            raise Interrupted(f"stopped while reading {self._name}")

    def _translate(self, cut: _Cut, member: bytes = b"") -> SourceError:
        if not self._members:
            return SourceError(
                f"{self._name} is not a tar archive: {cut.why}",
                hint="repair or remove it, or leave it out with source.exclude",
            )
        inside = f", in {member.decode('utf-8', 'backslashreplace')}" if member else ""
        return SourceTruncated(
            f"{self._name} is cut or damaged at byte {cut.offset}{inside}: {cut.why}; "
            "what came before was read",
            hint="repair or write it again; the next run then labels it as a new shard",
        )


def _checksum_fits(header: bytes) -> bool:
    """Sum of the header with its checksum field as blanks; old writers added signed bytes."""
    try:
        stated = int(header[148:156].split(b"\0", 1)[0].strip() or b"-1", 8)
    except ValueError:
        return False
    rest = header[:148] + header[156:BLOCK]
    unsigned = 256 + sum(rest)
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in rest)


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name

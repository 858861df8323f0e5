"""A forward-only tar reader for archives nobody vouches for; nothing is ever extracted.

Python's ``tarfile`` keeps every member in memory, reads an extension header of any announced
size whole, recurses on chains of them, and reads only the first member of a gzip file. This
reader keeps one member, caps what it holds, and tells a cut archive from a finished one.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol, cast

from storage.errors import Interrupted, SourceError, SourceTruncated
from storage.shards.tar_header import (
    BLOCK,
    Damaged,
    TarMember,
    body_size,
    checksum_fits,
    describe,
    is_zero,
    parse_pax,
    text_field,
)

_CHUNK = 1 << 20
_MAX_EXTENSION = 4 << 20  # a long name or a PAX header; real ones have some hundred bytes


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Cut(Exception):
    """The archive ended, or stopped making sense, at ``offset``."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(why)
        self.why, self.offset = why, offset


class _NoMoreGzip(_Cut):
    """Behind a finished gzip member comes something that is none."""


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
        SourceError: not one readable header: this is no tar archive.
        SourceTruncated: everything before was given, and then the archive ends in the middle,
            is damaged, or lacks the end-of-archive block that every complete tar has (GNU tar
            lets that pass; here images may be missing, and a person should hear of it).
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
        self._global_pax: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[TarMember]:
        try:
            yield from self._iterate()
        except _Cut as cut:
            raise self._translate(cut) from cut.__cause__

    def _iterate(self) -> Iterator[TarMember]:
        ended = False
        while True:
            self._skip_rest()
            start = self._position
            header = self._next_after_end() if ended else self._next_header()
            if header is None:
                return
            ended = is_zero(header)
            if not ended:
                member = self._member(header, start)
                self._unread = member.body_blocks * BLOCK
                self._members += 1
                yield member

    def _next_header(self) -> bytes:
        start = self._position
        header = self._read(BLOCK)
        if len(header) == BLOCK:
            return header
        if header:
            raise _Cut("it ends inside a header", start)
        raise _Cut("it ends without the end-of-archive block" if start else "it is empty", start)

    def _next_after_end(self) -> bytes | None:
        """A block of zeros, or the first header of an archive that follows, or None: it is over."""
        try:
            block = self._read(BLOCK)
        except _NoMoreGzip:
            return None
        if len(block) < BLOCK:
            return None
        return block if is_zero(block) or checksum_fits(block) else None

    def _member(self, header: bytes, start: int) -> TarMember:
        """Follow extension headers, in a loop, up to the header that describes a member."""
        pax: dict[bytes, bytes] = {}
        long_name = long_target = b""
        try:
            while True:
                if not checksum_fits(header):
                    raise Damaged("its header is damaged")
                kind = header[156:157]
                if kind in (b"x", b"X"):
                    pax |= parse_pax(self._extension(header))
                elif kind == b"g":
                    self._global_pax |= parse_pax(self._extension(header))
                elif kind == b"L":
                    long_name = text_field(self._extension(header))
                elif kind == b"K":
                    long_target = text_field(self._extension(header))
                else:
                    self._skip_sparse_map(header)
                    applying = self._global_pax | pax
                    return describe(header, applying, long_name, long_target, self._position)
                header = self._next_header()
        except Damaged as exc:
            raise _Cut(str(exc), start) from None

    def _extension(self, header: bytes) -> bytes:
        nbytes = body_size(header)
        if nbytes > _MAX_EXTENSION:
            raise Damaged(f"its extension header announces {nbytes} bytes")
        body = self._read(-(-nbytes // BLOCK) * BLOCK)
        if len(body) < nbytes:
            raise _Cut("it ends inside an extension header", self._position)
        return body[:nbytes]

    def _skip_sparse_map(self, header: bytes) -> None:
        """GNU's sparse members have map blocks between header and body, which size leaves out."""
        more = header[156:157] == b"S" and header[482] != 0
        while more:
            more = self._next_header()[504] != 0

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
            raise self._translate(cut, member) from cut.__cause__
        return body

    def skip_body(self, member: TarMember) -> None:
        """Pass over the current member's body; SourceTruncated where it is not all there."""
        try:
            self._skip_rest()
        except _Cut as cut:
            raise self._translate(cut, member) from cut.__cause__

    def _skip_rest(self) -> None:
        while self._unread > 0:
            skipped = len(self._read(min(self._unread, _CHUNK)))
            if not skipped:
                raise _Cut("it ends inside a member", self._position)
            self._unread -= skipped

    def _read(self, nbytes: int) -> bytes:
        """Up to ``nbytes`` bytes, fewer only at the end; never more memory than arrives."""
        parts: list[bytes] = []
        missing = nbytes
        while missing > 0:
            if self._abort is not None and self._abort():
                raise Interrupted(f"stopped while reading {self._name}")
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
            # gzip has one class for a failed checksum and for other bytes behind the last member.
            foreign = str(exc).startswith("Not a gzipped file")
            kind = _NoMoreGzip if foreign else _Cut
            raise kind(f"its compressed data are damaged ({exc})", self._position) from exc

    def _translate(self, cut: _Cut, member: TarMember | None = None) -> SourceError:
        if not self._members:
            return SourceError(
                f"{self._name} is not a tar archive: {cut.why}",
                hint="repair or remove it, or leave it out with source.exclude",
            )
        inside = "" if member is None else f" in {member.name.decode('utf-8', 'backslashreplace')}"
        return SourceTruncated(
            f"{self._name} is cut or damaged at byte {cut.offset}{inside}: {cut.why}; "
            "what came before was read",
            hint="repair it or write it again; the next run then labels it as a new shard",
        )

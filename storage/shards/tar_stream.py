"""A forward-only tar reader for untrusted archives; nothing is ever extracted.

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
from storage.shards.tar_end import ends_here, may_be_followed
from storage.shards.tar_header import (
    BLOCK,
    Damaged,
    TarMember,
    body_size,
    checksum_fits,
    describe,
    is_zero,
    long_text,
    parse_pax,
)

_CHUNK = 1 << 20
_MAX_EXTENSION = 4 << 20  # a long name or a PAX header; real ones have some hundred bytes
_MAX_SEARCH = 16 << 20  # bytes from the start in which a file must show that it is a tar
_WHY_ZEROS = "zeros or other bytes stand where a header belongs"


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Cut(Exception):
    """The archive ended, or stopped making sense, at ``offset``."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(why)
        self.why, self.offset = why, offset


class _NoMoreGzip(_Cut):
    """A finished gzip member is followed by bytes that are not one."""


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
        SourceError: no readable header: not a tar archive.
        SourceTruncated: after everything readable was given: the archive ends in the middle, is
            damaged, or lacks the end-of-archive block that every complete tar has (GNU tar lets
            that pass; here images may be missing, and a person should hear of it). Behind a
            damaged or zeroed header the search goes on for the next one.
        Interrupted: ``abort`` said yes.

    Blocks after the end marker are looked at too: where another archive follows (``cat a.tar
    b.tar``), its members count, as with ``tar --ignore-zeros``. Zeros that no tar program writes
    as an end are damage, see tar_end.py.
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
        self._base = 0  # where the current archive of several begins
        self._damage: _Cut | None = None
        self._unread = 0  # bytes of the current body and its padding not taken yet
        self._global_pax: dict[bytes, bytes] = {}

    def __iter__(self) -> Iterator[TarMember]:
        try:
            yield from self._iterate()
        except _Cut as cut:
            raise self._translate(self._damage or cut) from cut.__cause__

    def _iterate(self) -> Iterator[TarMember]:
        while True:
            self._skip_rest()
            header = self._next_header_or_end()
            if header is None:
                break
            member = self._member(header, self._position - BLOCK)
            if member is not None:
                self._unread = member.body_blocks * BLOCK
                self._members += 1
                yield member
        if self._damage is not None:
            raise self._damage

    def _next_header_or_end(self) -> bytes | None:
        """Return the next block whose checksum is a header's; None at the end of the archive.

        Zeros and other blocks before it are an end of an archive, or damage that is noted.
        """
        start, zeros, junk_at, zeros_behind = self._position, 0, -1, 0
        while True:
            at = self._position
            block = self._block_or_rest(after_zeros=zeros > 0)
            whole = len(block) == BLOCK
            if whole and is_zero(block):
                zeros += junk_at < 0
                zeros_behind += 1
                continue
            if whole and checksum_fits(block):
                self._check_gap(start, zeros, junk_at, at)
                return block
            if not whole and (is_zero(block) or junk_at >= 0):
                self._check_end(start, zeros, junk_at, zeros_behind, block)
                return None
            if junk_at < 0:
                junk_at = at
            zeros_behind = 0
            if not whole:
                self._check_end(start, zeros, junk_at, zeros_behind, block)
                return None
            if self._members == 0 and not zeros and self._position > _MAX_SEARCH:
                raise _Cut("its header is damaged", start)

    def _block_or_rest(self, *, after_zeros: bool) -> bytes:
        try:
            return self._read(BLOCK)
        except _NoMoreGzip:
            if after_zeros:
                return b""
            raise

    def _check_gap(self, start: int, zeros: int, junk_at: int, at: int) -> None:
        """Note the damage if what lies between ``start`` and the header at ``at`` is damage."""
        if at == start:
            return
        if junk_at >= 0:
            self._note(_Cut(_WHY_ZEROS if zeros else "its header is damaged", start))
        elif may_be_followed(zeros, at - self._base, at):
            self._base = at
        else:
            self._note(_Cut(_WHY_ZEROS, start))

    def _check_end(
        self, start: int, zeros: int, junk_at: int, zeros_behind: int, rest: bytes
    ) -> None:
        """Note the damage if the file does not end as an archive does.

        Args:
            start: where the last member ended.
            zeros: zero blocks from there.
            junk_at: where other bytes follow; -1: none do.
            zeros_behind: zero blocks at the end of the file.
            rest: the last block, shorter than a block.
        """
        if junk_at < 0:
            if zeros:
                if not ends_here(zeros, self._position - len(rest) - self._base):
                    self._note(_Cut(_WHY_ZEROS, start))
            elif rest:
                self._note(_Cut("it ends inside a header", start))
            else:
                why = "it ends without the end-of-archive block" if start else "it is empty"
                self._note(_Cut(why, start))
        elif not zeros:
            short = len(rest) > 0 and junk_at > self._position - BLOCK
            why = "it ends inside a header" if short else "its header is damaged"
            self._note(_Cut(why, start))
        elif zeros_behind > 1 or not may_be_followed(zeros, junk_at - self._base, junk_at):
            self._note(_Cut(_WHY_ZEROS, start))

    def _note(self, damage: _Cut) -> None:
        """Keep the first damage, to be told when everything readable was given."""
        self._damage = self._damage or damage

    def _next_header(self) -> bytes:
        """Return the block after an extension header, which must be a header too."""
        start = self._position
        header = self._read(BLOCK)
        if len(header) < BLOCK:
            why = "it ends inside a header" if header else "it ends behind an extension header"
            raise _Cut(why, start)
        return header

    def _member(self, header: bytes, start: int) -> TarMember | None:
        """Follow extension headers, in a loop, up to the header that describes a member.

        Returns:
            None where one of them is damaged: that is noted, and the search goes on behind it. The
            next member then has the name that its own header gives.
        """
        pax: dict[bytes, bytes] = {}
        long_name = long_target = b""
        try:
            while True:
                kind = header[156:157]
                if kind in (b"x", b"X"):
                    pax |= parse_pax(self._extension(header))
                elif kind == b"g":
                    self._global_pax |= parse_pax(self._extension(header))
                elif kind == b"L":
                    long_name = long_text(self._extension(header))
                elif kind == b"K":
                    long_target = long_text(self._extension(header))
                else:
                    self._skip_sparse_map(header)
                    applying = self._global_pax | pax
                    return describe(header, applying, long_name, long_target, self._position)
                header = self._next_header()
                if not checksum_fits(header):
                    raise Damaged("its header is damaged")
        except Damaged as exc:
            self._note(_Cut(str(exc), start))
            return None

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
        """Return the current member's body, in full; call once, before the next step of iteration.

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
            self._position += len(part)
            if len(part) == nbytes:  # nearly always
                return part
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

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
            "what is readable was read",
            hint="repair it or write it again; the next run then labels it as a new shard",
        )

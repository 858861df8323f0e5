"""Where the members of a tar lie, and which zeroed bytes make it another, shorter tar."""

from __future__ import annotations

import io
import tarfile

Span = tuple[str, int, int, bytes]  # name, start of its first header, end of its body, body


def spans_of(archive: bytes) -> list[Span]:
    """Return the members of an archive, by Python's own tarfile."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = list(tar)
        bodies = [tar.extractfile(m).read() for m in members]  # type: ignore[union-attr]
    spans, start = [], 0
    for member, body in zip(members, bodies, strict=True):
        end = member.offset_data + member.size
        spans.append((member.name, start, end, body))
        start = -(-end // 512) * 512
    return spans


def is_a_shorter_archive(damaged: bytes, spans: list[Span], begin: int) -> bool:
    """Whether the zeroed bytes are what a tar program writes behind the members before them: a
    record of 10 KiB filled up. No reader can tell that from an archive of these members."""
    end = max((-(-e // 512) * 512 for _, a, e, _ in spans if a < begin), default=0)
    zeros = len(damaged[end:]) - len(damaged[end:].lstrip(b"\0"))
    # Of a member with extension headers, its own header alone may be left.
    following = end + zeros // 512 * 512
    fits = following % 10240 == 0 and following - end <= 10752
    return fits and (following == len(damaged) or _is_header(damaged[following:][:512]))


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True

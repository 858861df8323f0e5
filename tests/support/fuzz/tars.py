"""Seeded damage to tars, aware of the format, with checksums recomputed to match."""

from __future__ import annotations

import gzip
import random

from tests.support.fuzz.mutations import ANY, Mutation


def with_checksum(header: bytes) -> bytes:
    """Return the header with the checksum that fits it, whatever else it says."""
    total = 256 + sum(header[:148]) + sum(header[156:512])
    return header[:148] + b"%06o\0 " % total + header[156:512]


_SIZES = (b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11,
          b"\xff" * 12, b"\x80" + bytes(10) + b"\x07", b"           \0", b"0x10\0\0\0\0\0\0\0\0",
          b"00000000777\0")  # fmt: skip
_NAMES = (b"../../escape.jpg", b"/etc/passwd.jpg", b"a/\0b.jpg", b"\xff\xfe.jpg", b"\x1b[31m.png",
          b"x" * 99 + b".", b"", b"..", b"C:\\x.jpg")  # fmt: skip


def tar_header(rng: random.Random, data: bytes) -> bytes:
    """One header lies, and its checksum fits the lie."""
    blocks = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not blocks:
        return data
    at = rng.choice(blocks)
    header = bytearray(data[at : at + 512])
    how = rng.randrange(6)
    if how == 0:
        header[124:136] = rng.choice(_SIZES)
    elif how == 1:
        header[156:157] = rng.choice((b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L", b"K",
                                      b"x", b"g", b"V", b"M", b"\0"))  # fmt: skip
    elif how == 2:
        header[0:100] = rng.choice(_NAMES).ljust(100, b"\0")[:100]
    elif how == 3:
        header[157:257] = rng.choice(_NAMES).ljust(100, b"\0")[:100]
    elif how == 4:
        header[345:500] = rng.choice(_NAMES).ljust(155, b"\0")[:155]
    else:
        where = rng.randrange(512)
        header[where] = rng.randrange(256)
    return data[:at] + with_checksum(bytes(header)) + data[at + 512 :]


def tar_extension(rng: random.Random, data: bytes) -> bytes:
    """PAX records, long names, and chains of them, put before some member."""
    at = 512 * rng.randrange(max(1, len(data) // 512))
    kind = rng.choice((b"x", b"g", b"L", b"K"))
    texts = (
        b"16 path=../x.jpg\n", b"11 size=99\n", b"22 size=99999999999999\n", b"9 size=-1\n",
        b"99999999999 path=x\n", b"30 GNU.sparse.name=/etc/shadow\n", b"0 =\n", b"5 a=b",
        b"21 GNU.sparse.major=1\n", rng.randbytes(40), b"n" * 5000 + b".jpg\0",
        b"13 path=\xff\xfe\n",
    )  # fmt: skip
    body = rng.choice(texts)
    header = bytearray(512)
    header[0:13] = b"././@LongLink"
    header[124:136] = b"%011o\0" % len(body)
    header[156:157] = kind
    header[257:263] = b"ustar\0"
    block = with_checksum(bytes(header)) + body + bytes(-len(body) % 512)
    return data[:at] + block * rng.choice((1, 1, 2, 200)) + data[at:]


def tar_blocks(rng: random.Random, data: bytes) -> bytes:
    """Blocks are dropped, doubled, zeroed or swapped."""
    blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
    pick, how = rng.randrange(len(blocks)), rng.randrange(4)
    if how == 0:
        del blocks[pick]
    elif how == 1:
        blocks.insert(pick, blocks[pick])
    elif how == 2:
        blocks[pick] = bytes(512)
    else:
        blocks.insert(rng.randrange(len(blocks)), blocks.pop(pick))
    return b"".join(blocks)


def tar_page(rng: random.Random, data: bytes) -> bytes:
    """A page of 4 KiB is zeroed, as after a crash of the machine that wrote it."""
    page = 4096 * rng.randrange(-(-len(data) // 4096))
    length = min(4096, len(data) - page)
    return data[:page] + bytes(length) + data[page + length :]


TAR: tuple[Mutation, ...] = (
    *ANY, *[tar_header] * 6, *[tar_extension] * 4, *[tar_blocks] * 3, *[tar_page] * 2,
)  # fmt: skip


def squeezed(rng: random.Random, data: bytes) -> bytes:
    """Compressed, in one or several gzip members."""
    cut = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        return gzip.compress(data, 1, mtime=0)
    return gzip.compress(data[:cut], 1, mtime=0) + gzip.compress(data[cut:], 1, mtime=0)

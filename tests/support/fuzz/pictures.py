"""Seeded damage to pictures, aware of their formats."""

from __future__ import annotations

import random
import struct
import zlib

from tests.support.fuzz.mutations import ANY, INTERESTING, LARGE, Mutation, edit_number


def png(rng: random.Random, data: bytes) -> bytes:
    """Chunks are dropped, doubled, moved, edited and invented, with checksums that fit."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return data
    pick = rng.randrange(len(chunks))
    name, body = chunks[pick]
    how = rng.randrange(6)
    if how == 0:
        del chunks[pick]
    elif how == 1:
        chunks[pick:pick] = [chunks[pick]] * rng.choice((1, 3, 300))
    elif how == 2:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks.pop(pick))
    elif how == 3:
        chunks[pick] = (name, rng.choice(ANY)(rng, body))
    elif how == 4:
        chunks[0] = (b"IHDR", _png_header(rng, chunks[0][1]))
    else:
        kinds = (b"iTXt", b"zTXt", b"tEXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL",
                 b"fdAT", b"gAMA", b"sBIT")  # fmt: skip
        made = (rng.choice(kinds), b"x\0\0" + zlib.compress(bytes(rng.choice((9, 1 << 20)))))
        chunks.insert(rng.randrange(len(chunks) + 1), made)
    return data[:8] + b"".join(
        len(b).to_bytes(4, "big") + n + b + zlib.crc32(n + b).to_bytes(4, "big") for n, b in chunks
    )


def _png_header(rng: random.Random, body: bytes) -> bytes:
    if len(body) != 13:
        return body
    width, height, *rest = struct.unpack(">IIBBBBB", body)
    fields = [width, height, *rest]
    which = rng.randrange(7)
    fields[which] = rng.choice(LARGE) if which < 2 else rng.randrange(256)
    return struct.pack(">IIBBBBB", *fields)


def jpeg(rng: random.Random, data: bytes) -> bytes:
    """Segments are stuffed in, doubled and edited; frame headers lie; scans are repeated."""
    marks = [i for i in range(len(data) - 3) if data[i] == 0xFF and 0xC0 <= data[i + 1] <= 0xFE]
    if not marks:
        return data
    at = rng.choice(marks)
    how = rng.randrange(5)
    if how == 0:
        stuffed = bytes([0xFF, rng.randrange(0xC0, 0xFF)])
        body = rng.randbytes(rng.choice((0, 2, 16, 4000)))
        said = rng.choice((len(body) + 2, 0, 1, 2, 65535))
        return data[:at] + stuffed + struct.pack(">H", said & 0xFFFF) + body + data[at:]
    if how == 1:
        end = min(len(data), at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
        return data[:end] + data[at:end] * rng.choice((1, 2, 40)) + data[end:]
    frames = [i for i in marks if data[i + 1] in (0xC0, 0xC1, 0xC2)]
    if how == 2 and frames:
        out = bytearray(data)
        field = rng.choice(frames) + rng.choice((4, 5, 6, 7, 8, 9, 10, 11, 12))
        if field < len(out):
            out[field] = rng.choice((0, 1, 2, 4, 16, 255, rng.randrange(256)))
        return bytes(out)
    if how == 3:
        return data[:at] + b"\xff" * rng.choice((1, 5, 2000)) + data[at:]
    return data[: at + 1] + bytes([rng.randrange(0xC0, 0xFF)]) + data[at + 2 :]


def tiff(rng: random.Random, data: bytes) -> bytes:
    """Entries of the first directory get other tags, types, counts and values."""
    if len(data) < 16 or data[2:4] not in (b"*\0", b"\0*"):
        return edit_number(rng, data)
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    if start + 2 > len(data):
        return data
    (count,) = struct.unpack_from(order + "H", data, start)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = start + 2 + 12 * rng.randrange(max(1, count))
        if at + 12 > len(out):
            break
        which = rng.randrange(5)
        if which == 0:
            known = (254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324,
                     325, 338, 339, 530, 34665, 274)  # fmt: skip
            struct.pack_into(order + "H", out, at, rng.choice(known))
        elif which == 1:
            struct.pack_into(order + "H", out, at + 2, rng.randrange(1, 19))
        elif which == 2:
            struct.pack_into(order + "I", out, at + 4, rng.choice((*INTERESTING, *LARGE)))
        else:
            struct.pack_into(order + "I", out, at + 8, rng.choice((*INTERESTING, *LARGE)))
    return bytes(out)


def riff(rng: random.Random, data: bytes) -> bytes:
    """Drop, double, rename and edit a WebP's chunks; keep the outer size consistent."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append([data[at : at + 4], data[at + 8 : at + 8 + size]])
        at += 8 + size + size % 2
    if not chunks:
        return data
    pick = rng.randrange(len(chunks))
    how = rng.randrange(5)
    if how == 0:
        del chunks[pick]
    elif how == 1:
        chunks[pick:pick] = [list(chunks[pick])] * rng.choice((1, 4, 100))
    elif how == 2:
        chunks[pick][0] = rng.choice((b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF",
                                      b"ICCP"))  # fmt: skip
    elif how == 3:
        chunks[pick][1] = rng.choice(ANY)(rng, chunks[pick][1])
    else:
        flags, sides = (
            rng.randrange(64),
            rng.choice((0, 7, 16383, (1 << 24) - 1)).to_bytes(3, "little"),
        )
        chunks.insert(0, [b"VP8X", bytes([flags, 0, 0, 0]) + sides + sides])
    body = b"WEBP" + b"".join(
        bytes(n) + len(b).to_bytes(4, "little") + bytes(b) + b"\0" * (len(b) % 2) for n, b in chunks
    )
    return b"RIFF" + (len(body) & 0xFFFFFFFF).to_bytes(4, "little") + body


def header_fields(rng: random.Random, data: bytes) -> bytes:
    """For BMP and GIF, whose header is a row of small numbers."""
    return edit_number(rng, data[:60]) + data[60:] if len(data) > 60 else data


def picture_mutations(data: bytes) -> tuple[Mutation, ...]:
    """Return what fits these bytes; of equal weight with what fits any."""
    if data.startswith(b"\x89PNG"):
        return (*ANY, *[png] * 9)
    if data.startswith(b"\xff\xd8"):
        return (*ANY, *[jpeg] * 9)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0"):
        return (*ANY, *[tiff] * 9)
    if data.startswith(b"RIFF"):
        return (*ANY, *[riff] * 9)
    return (*ANY, *[header_fields] * 6)

"""Seeded damage to any bytes: what disks, networks and curious people do to files."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

Mutation = Callable[[random.Random, bytes], bytes]

INTERESTING = (0, 1, 2, 7, 8, 16, 64, 100, 127, 128, 255, 256, 4096, 32767, 32768, 65535)
LARGE = (65536, 1 << 20, (1 << 24) - 1, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def set_bytes(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        if out:
            out[rng.randrange(len(out))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(out)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def remove(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def duplicate(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def shuffle(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    to = rng.randrange(len(data) + 1)
    rest = data[:start] + data[end:]
    return rest[:to] + data[start:end] + rest[to:]


def insert_noise(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 100, 5000))) + data[at:]


def zero_span(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def edit_number(rng: random.Random, data: bytes) -> bytes:
    """Replace a number somewhere, likely in the header, with one that trips parsers."""
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    reach = rng.choice((64, 512, len(data)))
    at = rng.randrange(max(1, min(reach, len(data)) - size + 1))
    value = rng.choice((*INTERESTING, *LARGE)) & ((1 << 8 * size) - 1)
    return data[:at] + struct.pack(form, value) + data[at + size :]


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 16, 64, 512, 4096)))


ANY: tuple[Mutation, ...] = (
    flip_bits, set_bytes, truncate, remove, duplicate, shuffle, insert_noise, zero_span,
    edit_number,
)  # fmt: skip


def mutated(
    rng: random.Random, data: bytes, mutations: Sequence[Mutation], others: Sequence[bytes] = ()
) -> bytes:
    """One to four mutations; now and then the tail of another seed is spliced on."""
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        data = rng.choice(mutations)(rng, data)
    if others and rng.random() < 0.08:
        other = rng.choice(others)
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    return data[: 4 << 20]

"""read_shard() on cut, damaged and hostile tars: the readable prefix, then a clear error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import SourceError, SourceTruncated
from storage.records import ImageRecord, Shard, StoredObject
from storage.shards.reading import read_shard
from tests.support.samples.peak_memory import PeakMemory
from tests.support.samples.tar_samples import Member, records_of, tar_of, zipped

BODY = random.Random(0)
MEMBERS: list[Member] = [
    (f"{'long/' * (n % 3 * 40)}{n:02}.jpg", BODY.randbytes(37 * n * n % 1500)) for n in range(14)
]


def records_and_error(archive: bytes, **options: Any) -> tuple[list[ImageRecord], Exception | None]:
    try:
        return records_of(archive, **options), None
    except SourceError as error:
        return error.records, error  # type: ignore[attr-defined]


def ends_of(archive: bytes) -> list[tuple[str, int]]:
    """(image id, end of its body) by Python's own tarfile, as the oracle."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(f"s/x.tar/{m.name}", m.offset_data + m.size) for m in tar]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_anywhere_keeps_every_image_before_it(tar_format: int) -> None:
    archive = tar_of(*MEMBERS, tar_format=tar_format)
    ends = ends_of(archive)
    marker = -(-ends[-1][1] // 512) * 512
    whole = {r.image_id: r.data for r in records_of(archive)}
    for cut in {*range(0, marker + 512, 97), *(end for _, end in ends)}:
        records, error = records_and_error(archive[:cut])
        assert [r.image_id for r in records] == [name for name, end in ends if end <= cut]
        assert all(r.data == whole[r.image_id] for r in records)
        assert error is not None
    assert records_and_error(archive[: marker + 512])[1] is None


def test_a_cut_compressed_tar_keeps_every_image_that_can_be_unpacked() -> None:
    archive = tar_of(*MEMBERS)
    packed = zipped(archive)
    ends = ends_of(archive)
    for cut in range(0, len(packed) - 8, 53):
        unpacked = len(zlib.decompressobj(31).decompress(packed[:cut]))
        records, error = records_and_error(packed[:cut])
        assert [r.image_id for r in records] == [name for name, end in ends if end <= unpacked]
        complete = unpacked == len(archive)
        assert error is not None or complete


def test_a_cut_tar_says_where_and_in_which_image() -> None:
    archive = tar_of(("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600))
    with pytest.raises(SourceTruncated, match=r"s/x\.tar .* byte 2048 in b\.jpg: 88 of 600 bytes"):
        records_of(archive[: 2048 + 88])
    with pytest.raises(SourceTruncated, match="without the end-of-archive block"):
        records_of(archive[: 2 * (512 + 1024)])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"x", "it ends inside a header"),
        (b"<html>" * 500, "its header is damaged"),
        (os.urandom(5000), "is not a tar archive"),
        (b"\x1f\x8b" + bytes(500), "compressed data are damaged"),
        (b"\x1f\x8b\x08", "compressed data end"),
        (zipped(b"no tar inside" * 100), "its header is damaged"),
        (zipped(b""), "it is empty"),
    ],
)
def test_a_file_that_is_not_a_tar_is_reported_as_such(content: bytes, why: str) -> None:
    with pytest.raises(SourceError, match="is not a tar archive") as caught:
        records_of(content)
    assert why in caught.value.message
    assert not isinstance(caught.value, SourceTruncated)


def test_a_damaged_header_costs_its_own_member_only() -> None:
    archive = bytearray(tar_of(("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")))
    archive[1024 + 3] ^= 0xFF
    records, error = records_and_error(bytes(archive))
    assert [r.data for r in records] == [b"1", b"3"]
    assert isinstance(error, SourceTruncated)
    assert "byte 1024" in error.message


def header(size_field: bytes, name: bytes = b"b.jpg", kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = size_field
    block[136:157] = b"00000000000\0" + b" " * 8 + kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "size_field",
    [
        b"77777777777\0",  # 8 GiB
        b"\x80" + (2**62).to_bytes(11, "big"),
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,  # negative
        b"-0000000001\0",
        b"9999999999\0\0",
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g"])
def test_absurd_sizes_cost_neither_memory_nor_the_images_before(
    size_field: bytes, kind: bytes
) -> None:
    archive = tar_of(("a.jpg", b"1"))[:1024] + header(size_field, kind=kind) + bytes(4096)
    memory = PeakMemory()
    records, error = records_and_error(archive, max_image_bytes=2**63)
    assert [r.data for r in records] == [b"1"]
    assert isinstance(error, SourceTruncated)
    assert memory.growth() < 32 << 20


def test_a_million_extension_headers_do_not_exhaust_the_stack() -> None:
    pax = b"18 path=other.jpg\n"
    chain = (header(b"%011o\0" % len(pax), kind=b"x") + pax.ljust(512, b"\0")) * 3000
    archive = chain + header(b"%011o\0" % 3) + b"end".ljust(512, b"\0") + bytes(1024)
    (record,) = records_of(archive)
    assert (record.image_id, record.data) == ("s/x.tar/other.jpg", b"end")


@pytest.mark.parametrize(
    "pax",
    [
        b"0 path=x\n",
        b"99 path=x\n",
        b"path=x\n",
        b"-5 path=x\n",
        b"9 pathxxx\n",
        b"1 \n",
        b"\xff" * 40,
    ],
)
def test_damaged_extension_headers_are_damage(pax: bytes) -> None:
    archive = (
        tar_of(("a.jpg", b"1"))[:1024]
        + header(b"%011o\0" % len(pax), kind=b"x")
        + pax.ljust(512, b"\0")
        + header(b"%011o\0" % 0)
        + bytes(1024)
    )
    records, error = records_and_error(archive)
    # The name in the damaged part is lost; the image behind it is not.
    assert [(r.image_id, r.data) for r in records] == [
        ("s/x.tar/a.jpg", b"1"),
        ("s/x.tar/b.jpg", b""),
    ]
    assert isinstance(error, SourceTruncated)


def test_a_pax_size_overrides_the_header() -> None:
    pax = b"11 size=600\n".replace(b"11", b"12")
    archive = (
        header(b"%011o\0" % len(pax), kind=b"x")
        + pax.ljust(512, b"\0")
        + header(b"00000000000\0", b"big.jpg")
        + b"y" * 600
        + bytes(424)
        + bytes(1024)
    )
    (record,) = records_of(archive)
    assert record.data == b"y" * 600


class Endless:
    """A store whose one object is gigabytes of compressed zeros, made as it is read."""

    def __init__(self, start: bytes, zeros: int) -> None:
        self.start, self.zeros = start, zeros

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        raise AssertionError("a tar is streamed")

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        zeros = bytes(16 << 20)

        def parts() -> Iterator[bytes]:
            yield packer.compress(self.start)
            for _ in range(self.zeros // len(zeros)):
                yield packer.compress(zeros)
            yield packer.flush()

        made = parts()
        buffer = bytearray()

        class Stream(io.RawIOBase):
            def read(self, size: int = -1) -> bytes:
                while len(buffer) < size and (part := next(made, None)) is not None:
                    buffer.extend(part)
                given = bytes(buffer[:size])
                del buffer[:size]
                return given

        yield cast(BinaryIO, Stream())


TAR = Shard("0" * 16, "tar", (StoredObject("bomb.tgz", 1, "e"),))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [b"0", b"L", b"S"])
def test_a_gzip_bomb_takes_no_memory(kind: bytes) -> None:
    nbytes = 1 << 30
    start = header(b"%011o\0" % nbytes, kind=kind)
    memory = PeakMemory()
    try:
        records = list(read_shard(Endless(start, nbytes), TAR, max_image_bytes=1 << 20))
        assert all(r.status in ("too_large", "unsupported") for r in records)
    except SourceError:
        pass
    assert memory.growth() < 100 << 20


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 13_000), st.binary(min_size=1, max_size=30)), max_size=6),
    st.booleans(),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_damage_anywhere_never_costs_what_came_before_it(
    edits: list[tuple[int, bytes]], compressed: bool, tar_format: int
) -> None:
    archive = tar_of(*MEMBERS, tar_format=tar_format)
    damaged = bytearray(archive)
    for at, noise in edits:
        damaged[at : at + len(noise)] = noise[: max(0, len(damaged) - at)]
    first = min((at for at, _ in edits), default=len(archive))
    records, _ = records_and_error(zipped(bytes(damaged)) if compressed else bytes(damaged))
    intact = [name for name, end in ends_of(archive) if end <= first]
    assert [r.image_id for r in records][: len(intact)] == intact
    assert len({r.image_id for r in records}) == len(records)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.integers(10, 4000), st.binary(min_size=1, max_size=8))
def test_damage_in_compressed_bytes_gives_records_or_our_error(at: int, noise: bytes) -> None:
    packed = bytearray(zipped(tar_of(*MEMBERS)))
    at = min(at, len(packed) - 1)
    packed[at : at + len(noise)] = noise
    records, _ = records_and_error(bytes(packed))
    assert len({r.image_id for r in records}) == len(records)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_not_a_tar(noise: bytes) -> None:
    records, _ = records_and_error(noise)
    assert records == []


def test_a_gzip_header_without_end_is_damage() -> None:
    endless_name = b"\x1f\x8b\x08\x08" + struct.pack("<IBB", 0, 0, 3) + b"n" * 200_000
    with pytest.raises(SourceError, match="compressed data end"):
        records_of(endless_name)


def test_a_wrong_checksum_of_the_compressed_data_is_told() -> None:
    packed = bytearray(gzip.compress(tar_of(("a.jpg", b"1"))))
    packed[-6] ^= 1
    records, error = records_and_error(bytes(packed))
    assert [r.data for r in records] == [b"1"]
    assert isinstance(error, SourceTruncated)
    assert "CRC check failed" in error.message


@pytest.mark.parametrize(
    "packed",
    [
        lzma.compress(bytes(100 << 20), preset=0),
        bz2.compress(bytes(100 << 20), 1),
        b"\x28\xb5\x2f\xfd" + bytes(1 << 20),  # how a zstd frame begins
    ],
    ids=["xz", "bzip2", "zstd"],
)
def test_other_compressions_are_not_tars_and_take_no_memory(packed: bytes) -> None:
    memory = PeakMemory()
    records, error = records_and_error(packed)
    assert records == []
    assert isinstance(error, SourceError)
    assert memory.growth() < 16 << 20

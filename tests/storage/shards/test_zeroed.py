"""read_shard() on tars with zeroed parts: no other member is lost, and the damage is told."""

from __future__ import annotations

import io
import random
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.errors import SourceError, SourceTruncated
from storage.records import ImageRecord
from storage.shards.tar_writer import TarWriter
from tests.support.samples.tar_samples import Member, records_of, tar_of, zipped
from tests.support.samples.zeroed_tars import is_a_shorter_archive, spans_of

NOISE = random.Random(1)
# Bodies without a zero, so that each zeroed byte of one is a difference.
MEMBERS: list[Member] = [
    (
        f"{'folder/' * (18 * (n % 4 == 3))}{'é' * (n % 5 == 4)}{n:02}.jpg",
        bytes(NOISE.choices(range(1, 256), k=(n * 977) % 5000)),
    )
    for n in range(16)
]


class _Kept(io.BytesIO):
    def close(self) -> None:
        """Keep the bytes."""


def ours(*members: Member) -> bytes:
    file = _Kept()
    writer = TarWriter(file)
    for name, body, *_ in members:
        writer.add(name, body)
    writer.close()
    return file.getvalue()


ARCHIVES = {
    "pax": tar_of(*MEMBERS),
    "gnu": tar_of(*MEMBERS, tar_format=tarfile.GNU_FORMAT),
    "ours": ours(*MEMBERS),
}


def read(archive: bytes) -> tuple[list[ImageRecord], Exception | None]:
    try:
        return records_of(archive), None
    except SourceError as error:
        return error.records, error  # type: ignore[attr-defined]


def check(archive: bytes, begin: int, end: int, *, compressed: bool = False) -> None:
    """Compare every member before and after bytes [begin, end) are zeroed."""
    spans = [(f"s/x.tar/{name}", *rest) for name, *rest in spans_of(archive)]
    damaged = archive[:begin] + bytes(len(archive[begin:end])) + archive[end:]
    records, error = read(zipped(damaged) if compressed else damaged)
    found = {r.image_id: r.data for r in records}
    assert len(found) == len(records)
    untouched = [(name, body) for name, a, b, body in spans if b <= begin or a >= end]
    assert [r.image_id for r in records if r.image_id in dict(untouched)] == [
        name for name, _ in untouched
    ]
    assert all(found[name] == body for name, body in untouched)
    # A member that is not there as it was, without an error, is a lost image.
    whole = {name: body for name, _, _, body in spans}
    changed = {name for name in whole if name not in found}
    in_headers = bool(changed) or any(name not in whole for name in found)
    if in_headers and not is_a_shorter_archive(damaged, spans, begin):
        assert isinstance(error, SourceTruncated if records else SourceError)
    if not in_headers and damaged == archive:
        assert error is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("length", [512, 4096])
def test_a_zeroed_block_or_page_anywhere_costs_what_it_covers_and_is_told(
    kind: str, length: int
) -> None:
    archive = ARCHIVES[kind]
    for begin in range(0, len(archive), length):
        check(archive, begin, begin + length)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHIVES)
def test_any_zeroed_byte_of_a_header_is_told(kind: str) -> None:
    archive = ARCHIVES[kind]
    headers = [(a, e - len(body)) for _, a, e, body in spans_of(archive)]
    for begin in [at for start, end in headers for at in range(start, end) if archive[at]]:
        check(archive, begin, begin + 1)


def test_zeros_inside_a_compressed_tar_are_found_too() -> None:
    archive = ARCHIVES["pax"]
    for begin in range(0, len(archive), 512):
        check(archive, begin, begin + 512, compressed=True)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(ARCHIVES)), st.integers(0, 60_000), st.integers(1, 20_000))
@example("ours", 777, 8968)  # an extension header goes, the member's own stays
@example("ours", 5124, 1)  # of an extension header, the first letter of "path"
def test_zeros_of_any_length_at_any_place(kind: str, begin: int, length: int) -> None:
    archive = ARCHIVES[kind]
    check(archive, min(begin, len(archive) - 1), begin + length)


@pytest.mark.parametrize("zeros", [3, 8, 64, 128])
def test_zeros_that_no_tar_program_writes_as_an_end_are_told(zeros: int) -> None:
    members = ours(("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600))[:-1024]
    records, error = read(members + bytes(zeros * 512))
    assert [r.data for r in records] == [b"1" * 600, b"2" * 600]
    assert isinstance(error, SourceTruncated)
    assert f"byte {len(members)}" in error.message
    assert read(members + bytes(1024))[1] is None


@pytest.mark.parametrize("record", [10, 20, 64, 256, 2048])
def test_an_end_padded_to_a_record_is_an_end(record: int) -> None:
    members = ours(("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600))[:-1024]
    padded = members + bytes(1024)
    padded += bytes(-len(padded) % (record * 512))
    records, error = read(padded)
    assert len(records) == 2
    assert error is None


def test_a_file_of_zeros_is_not_a_tar() -> None:
    with pytest.raises(SourceError, match="is not a tar archive: zeros or other bytes"):
        records_of(bytes(100_000))


def test_a_tar_whose_first_page_is_zeroed_gives_the_rest() -> None:
    archive = ARCHIVES["ours"]
    records, error = read(bytes(4096) + archive[4096:])
    names = [f"s/x.tar/{name}" for name, start, _, _ in spans_of(archive) if start >= 4096]
    assert [r.image_id for r in records] == names
    assert len(names) > 10
    assert isinstance(error, SourceTruncated)

"""read_shard() on tars: every image once, by its name, with the place where its bytes lie."""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from storage.errors import Interrupted, ObjectChanged, ObjectNotFound
from storage.records import StoredObject
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source, tar_shards
from storage.shards.tar_writer import TarWriter
from storage.stores.open import open_store
from tests.support.samples.peak_memory import PeakMemory
from tests.support.samples.tar_samples import Member, records_of, store_of, tar_of, zipped

LONG = "/".join(["folder"] * 60)
MEMBERS: list[Member] = [
    ("b.jpg", b"bb" * 400),
    ("b.json", b"{}"),
    ("a.PNG", b"a"),
    ("a.txt", b"cat"),
    ("a.cls", b"3"),
    ("deep/er/c.JpEg", b"c" * 512),
    ("deep/._c.jpeg", b"resource fork"),
    ("d.webp", b"d"),
    ("e.bmp", b"e"),
    ("f.tiff", b"f"),
    ("f.tif", b"ff"),
    ("folder.jpg", b"", {"type": tarfile.DIRTYPE}),
    ("README", b"about"),
]
IMAGES = {
    "b.jpg": b"bb" * 400, "a.PNG": b"a", "deep/er/c.JpEg": b"c" * 512, "d.webp": b"d",
    "e.bmp": b"e", "f.tiff": b"f", "f.tif": b"ff",
}  # fmt: skip


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_images_come_in_order_and_sidecars_do_not(tar_format: int, compressed: bool) -> None:
    plain = tar_of(*MEMBERS, tar_format=tar_format)
    records = records_of(zipped(plain) if compressed else plain)
    assert [(r.image_id, r.data) for r in records] == [
        (f"s/x.tar/{name}", body) for name, body in IMAGES.items()
    ]
    assert all(r.status == "ok" and r.error is None for r in records)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(tar_format: int) -> None:
    names = [f"{LONG}/图像 ü.jpg", "é" * 120 + ".png", "plain.jpg"]
    archive = tar_of(*[(name, b"x") for name in names], tar_format=tar_format)
    assert [r.image_id for r in records_of(archive)] == [f"s/x.tar/{name}" for name in names]


def test_long_ustar_names_use_the_prefix_field() -> None:
    name = "p" * 90 + "/" + "n" * 90 + ".jpg"
    archive = tar_of((name, b"x"), tar_format=tarfile.USTAR_FORMAT)
    assert records_of(archive)[0].image_id == f"s/x.tar/{name}"


def test_a_ranged_read_at_the_offset_gets_the_image_back() -> None:
    archive = tar_of(*MEMBERS, (f"{LONG}.jpg", b"behind an extension header" * 30))
    store = store_of(archive)
    records = records_of(archive)
    assert len(records) == len(IMAGES) + 1
    for record in records:
        assert record.offset is not None
        assert store.get_range("s/x.tar", record.offset, record.nbytes) == record.data


def test_a_compressed_tar_has_no_offsets() -> None:
    assert {r.offset for r in records_of(zipped(tar_of(*MEMBERS)), "x.tar.gz")} == {None}


@pytest.mark.parametrize("key", ["x.tar", "x.TGZ", "x.tar.gz"])
def test_compression_is_told_by_the_bytes_and_not_by_the_name(key: str) -> None:
    for archive in (tar_of(*MEMBERS), zipped(tar_of(*MEMBERS))):
        assert len(records_of(archive, key)) == len(IMAGES)


def test_repeated_names_stay_apart() -> None:
    archive = tar_of(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.jpg", b"4"))
    assert [(r.image_id, r.data) for r in records_of(archive)] == [
        ("s/x.tar/a.jpg", b"1"),
        ("s/x.tar/b.jpg", b"2"),
        ("s/x.tar/a.jpg#2", b"3"),
        ("s/x.tar/a.jpg#3", b"4"),
    ]


def test_names_that_are_not_utf8_become_printable_and_stay_unique() -> None:
    archive = tar_of(
        ("\udcff.jpg", b"1"),
        ("\\xff.jpg", b"2"),
        ("\udced\udca0\udc80.jpg", b"3"),
        tar_format=tarfile.GNU_FORMAT,
    )
    ids = [r.image_id for r in records_of(archive)]
    assert ids == [r"s/x.tar/\xff.jpg", r"s/x.tar/\x5cxff.jpg", r"s/x.tar/\xed\xa0\x80.jpg"]
    assert all(image_id.encode() for image_id in ids)


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../../up.jpg", "./here.jpg", "a//b.jpg"])
def test_hostile_paths_are_just_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (record,) = records_of(tar_of((name, b"x")))
    assert record.image_id == f"s/x.tar/{name}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}, "a symlink to '/etc/shadow'"),
        ({"type": tarfile.LNKTYPE, "linkname": "real.jpg"}, "a hardlink to 'real.jpg'"),
        ({"type": tarfile.SYMTYPE, "linkname": "x/" * 90}, f"a symlink to '{'x/' * 90}'"),
        ({"type": tarfile.FIFOTYPE}, "a fifo member"),
        ({"type": tarfile.CHRTYPE}, "a device member"),
        ({"type": b"Z"}, "unknown type"),
    ],
)
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_anything_but_a_plain_file_is_an_unsupported_row(
    tar_format: int, fields: dict[str, object], told: str
) -> None:
    members: list[Member] = [("real.jpg", b"r"), ("odd.jpg", b"", dict(fields)), ("last.jpg", b"l")]
    first, odd, last = records_of(tar_of(*members, tar_format=tar_format))
    assert (first.data, last.data) == (b"r", b"l")
    assert (odd.image_id, odd.status, odd.data) == ("s/x.tar/odd.jpg", "unsupported", None)
    assert odd.error is not None
    assert told in odd.error


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_sparse_members_are_unsupported_rows(tmp_path: Path, tar_format: str) -> None:
    with (tmp_path / "holes.jpg").open("wb") as file:
        for hole in range(12):  # more holes than the first header has room for
            file.seek(hole << 17)
            file.write(b"x")
    (tmp_path / "z.jpg").write_bytes(b"z")
    command = ["tar", "-S", f"--format={tar_format}", "-cf", "x.tar", "holes.jpg", "z.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    holes, last = records_of((tmp_path / "x.tar").read_bytes())
    assert (holes.image_id, holes.status) == ("s/x.tar/holes.jpg", "unsupported")
    assert holes.error == "a sparse member, not a plain file"
    assert last.data == b"z"


def test_members_over_the_limit_are_rows_and_the_next_ones_are_read() -> None:
    archive = tar_of(("big.jpg", b"x" * 5000), ("small.jpg", b"y" * 1000))
    big, small = records_of(archive, max_image_bytes=1000)
    assert (big.status, big.data, big.nbytes, big.offset) == ("too_large", None, 5000, 512)
    assert big.error == "5000 bytes; this run takes images up to 1000"
    assert small.data == b"y" * 1000


def test_an_empty_image_is_handed_on_as_it_is() -> None:
    (record,) = records_of(tar_of(("empty.jpg", b"")))
    assert (record.status, record.data, record.nbytes) == ("ok", b"", 0)


def test_an_archive_without_members_has_no_records() -> None:
    assert records_of(tar_of()) == []


def test_archives_that_follow_one_another_are_all_read() -> None:
    first, second = tar_of(("a.jpg", b"1")), tar_of(("b.jpg", b"2"))
    expected = ["s/x.tar/a.jpg", "s/x.tar/b.jpg"]
    assert [r.image_id for r in records_of(first + second)] == expected
    assert [r.image_id for r in records_of(zipped(first) + zipped(second))] == expected


def test_padding_behind_the_end_is_ignored() -> None:
    archive = tar_of(("a.jpg", b"1"))
    for trailing in (b"\0" * 1000, b"garbage", b"garbage" * 1000):
        assert len(records_of(archive + trailing)) == 1
        assert len(records_of(zipped(archive) + trailing)) == 1


def test_members_as_gnu_tar_and_bsd_tools_write_them(tmp_path: Path) -> None:
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    os.link(tmp_path / "one.jpg", tmp_path / "same.jpg")
    for tar_format in ("v7", "oldgnu", "gnu", "ustar", "posix"):
        names = ["one.jpg", "two.jpg", "same.jpg"]
        command = ["tar", f"--format={tar_format}", "-cf", "x.tar", *names]
        subprocess.run(command, cwd=tmp_path, check=True)
        one, two, same = records_of((tmp_path / "x.tar").read_bytes())
        assert (one.data, two.data) == (b"one.jpg", b"two.jpg")
        assert same.status == "unsupported"


def test_a_tar_that_vanished_or_changed_is_the_stores_error() -> None:
    store = store_of(tar_of(("a.jpg", b"1")))
    (shard,) = tar_shards(store.list())
    store.put("s/x.tar", tar_of(("a.jpg", b"2")))
    with pytest.raises(ObjectChanged):
        list(read_shard(store, shard, max_image_bytes=100))
    store.delete("s/x.tar")
    with pytest.raises(ObjectNotFound):
        list(read_shard(store, shard, max_image_bytes=100))


def test_reading_stops_when_asked_to() -> None:
    store = store_of(tar_of(*[(f"{n}.jpg", b"x") for n in range(50)]))
    (shard,) = tar_shards(store.list())
    taken: list[str] = []
    records = read_shard(store, shard, max_image_bytes=100, abort=lambda: len(taken) >= 3)
    with pytest.raises(Interrupted):
        taken.extend(record.image_id for record in records)
    assert len(taken) == 3


def test_a_tar_in_a_folder_reads_like_one_in_memory(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(*MEMBERS))
    store = open_store(str(tmp_path))
    (shard,) = tar_shards(list_source(store))
    assert shard.objects[0].key == "x.tar"
    assert len(list(read_shard(store, shard, max_image_bytes=10_000))) == len(IMAGES)


def test_tar_shards_skip_everything_but_tars() -> None:
    listed = [StoredObject(key, 1, "e") for key in ("a.jpg", "b.tar", "c.txt", "d.tgz")]
    assert [s.key for s in tar_shards(listed)] == ["b.tar", "d.tgz"]


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_memory_does_not_grow_with_the_shard(tmp_path: Path, compressed: bool) -> None:
    body = os.urandom(200_000)
    growth: list[int] = []
    for images in (100, 2000):  # 20 MB, 400 MB
        path = tmp_path / f"{images}.tar"
        with path.open("wb") as file:
            packed = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=0) if compressed else file
            writer = TarWriter(cast(BinaryIO, packed))
            for number in range(images):
                writer.add(f"{number}.jpg", body)
            writer.close()
        store = open_store(str(tmp_path))
        (shard,) = tar_shards(list_source(store, include=[path.name]))
        memory = PeakMemory()
        records = read_shard(store, shard, max_image_bytes=1 << 20)
        assert sum(record.data == body for record in records) == images
        growth.append(memory.growth())
        path.unlink()
    assert growth[1] < growth[0] + (16 << 20)
    assert growth[1] < 32 << 20

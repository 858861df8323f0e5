"""Loose images: which are listed, how they group, and reading them in parallel, in order."""

from __future__ import annotations

import gzip
import os
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import AccessDenied, Interrupted, ObjectUnreadable, StorageError
from storage.records import Shard, StoredObject
from storage.shards.reading import read_shard
from storage.shards.selecting import LeftOut, classify, group_images, list_source, tar_shards
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.samples.tar_samples import tar_of


def filled(*keys: str) -> MemoryStore:
    store = MemoryStore()
    for key in keys:
        store.put(key, key.encode())
    return store


KEYS = (
    "a/1.jpg", "a/2.JPEG", "a/b/3.png", "a/notes.txt", "b/4.tif", "b/._4.tif", "c.tar",
    "d/e.tar.gz", "top.webp",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "include", "exclude", "expected"),
    [
        ("auto", [], [], "a/1.jpg a/2.JPEG a/b/3.png b/4.tif c.tar d/e.tar.gz top.webp"),
        ("tar", [], [], "c.tar d/e.tar.gz"),
        ("images", [], [], "a/1.jpg a/2.JPEG a/b/3.png b/4.tif top.webp"),
        ("auto", ["*.jpg", "*.png"], [], "a/1.jpg a/b/3.png"),
        ("auto", ["a/*"], [], "a/1.jpg a/2.JPEG"),
        ("auto", ["a/**"], [], "a/1.jpg a/2.JPEG a/b/3.png"),
        ("auto", ["**/*.tar*"], [], "c.tar d/e.tar.gz"),
        ("auto", ["/a/?.jpg"], [], "a/1.jpg"),
        ("auto", ["[!a]/*"], [], "b/4.tif d/e.tar.gz"),
        ("auto", [], ["a/**", "*.tar*"], "b/4.tif top.webp"),
        ("images", ["a/**"], ["3.*"], "a/1.jpg a/2.JPEG"),
        ("auto", ["A/*"], [], ""),
    ],
)
def test_what_is_listed(
    kind: Literal["auto", "tar", "images"],
    include: Sequence[str],
    exclude: Sequence[str],
    expected: str,
) -> None:
    found = list_source(filled(*KEYS), kind=kind, include=include, exclude=exclude)
    assert [o.key for o in found] == expected.split()


@pytest.mark.parametrize("odd", ["a[b].jpg", "a(b)+.jpg", "a{b}.jpg", "new\nline.jpg", "a\\b.jpg"])
def test_odd_characters_in_keys_do_not_upset_the_globs(odd: str) -> None:
    store = filled(odd, "other.png")
    assert [o.key for o in list_source(store, include=["*.jpg"])] == [odd]


def test_names_are_told_apart_in_any_case() -> None:
    for key in ("x/A.JPG", "a.jpeg", "a.Tif", "a.TIFF", "a.bmp", "a.webp", "a.png", "a.tar.jpg"):
        assert classify(key) == "image"
    for key in ("a.tar", "A.TAR.GZ", "b/a.tgz"):
        assert classify(key) == "tar"
    for key in ("a.gz", "a.jpg.json", "jpg", "._a.jpg", "._a.tar", "a.jpg/readme", ""):
        assert classify(key) == "other"


@given(st.integers(0, 60), st.integers(1, 25))
def test_groups_hold_every_image_once_in_order(images: int, shard_size: int) -> None:
    listed = [StoredObject(f"{n:03}.jpg", n, f"e{n}") for n in range(images)]
    shards = list(group_images([*listed, StoredObject("x.tar", 1, "e")], shard_size))
    assert [o for shard in shards for o in shard.objects] == listed
    assert all(len(shard.objects) == shard_size for shard in shards[:-1])
    assert len({shard.shard_id for shard in shards}) == len(shards)


def read(store: MemoryStore, shard: Shard, **options: int) -> list[tuple[str, str, bytes | None]]:
    records = read_shard(store, shard, **({"max_image_bytes": 1000} | options))  # type: ignore[arg-type]
    return [(r.image_id, r.status, r.data) for r in records]


def test_images_come_in_listing_order() -> None:
    store = filled(*(f"{n:03}.jpg" for n in range(100)))
    (shard,) = group_images(store.list(), 1000)
    expected = [(f"{n:03}.jpg", "ok", f"{n:03}.jpg".encode()) for n in range(100)]
    for readers in (1, 3, 16):
        assert read(store, shard, readers=readers) == expected


def test_what_changed_or_vanished_since_the_listing_is_missing() -> None:
    store = filled("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    (shard,) = group_images(store.list(), 10)
    store.put("b.jpg", b"another")
    store.delete("c.jpg")
    found = list(read_shard(store, shard, max_image_bytes=1000))
    assert [r.status for r in found] == ["ok", "missing", "missing", "ok"]
    assert "changed since it was listed" in (found[1].error or "")
    assert "deleted since it was listed" in (found[2].error or "")
    assert found[1].data is None


def test_images_over_the_limit_are_not_fetched() -> None:
    store = filled("a.jpg")
    shard = Shard("0" * 16, "images", (StoredObject("gone-but-not-fetched.jpg", 2000, "e"),))
    (record,) = read_shard(store, shard, max_image_bytes=1000)
    assert (record.status, record.nbytes, record.data) == ("too_large", 2000, None)


def test_empty_images_are_handed_on() -> None:
    store = MemoryStore()
    store.put("e.jpg", b"")
    (shard,) = group_images(store.list(), 1)
    assert read(store, shard) == [("e.jpg", "ok", b"")]


def test_links_and_pipes_in_a_folder_are_unsupported_rows(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    store = open_store(str(tmp_path))
    (shard,) = group_images(list_source(store), 10)
    found = list(read_shard(store, shard, max_image_bytes=1000))
    assert [(r.image_id, r.status, r.data) for r in found] == [
        ("a.jpg", "ok", b"a"),
        ("link.jpg", "unsupported", None),
        ("loop.jpg", "unsupported", None),
        ("pipe.jpg", "unsupported", None),
    ]
    assert "link" in (found[1].error or "")


def test_a_file_replaced_by_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    store = open_store(str(tmp_path))
    (shard,) = group_images(list_source(store), 10)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "secret.jpg").write_bytes(b"s")
    (tmp_path / "a.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(StorageError, match="symbolic link"):
        list(read_shard(store, shard, max_image_bytes=1000))


class SlowStore:
    """Counts what is asked for at once; each object is ``nbytes`` long."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.lock = threading.Lock()
        self.running = self.most_running = self.asked = 0

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        with self.lock:
            self.running += 1
            self.asked += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(0.002)
        with self.lock:
            self.running -= 1
        return bytes(self.nbytes)

    def stream(self, key: str, *, if_match: str | None = None) -> AbstractContextManager[BinaryIO]:
        raise AssertionError("loose images are fetched whole")


def shard_of(images: int, nbytes: int) -> Shard:
    objects = tuple(StoredObject(f"{n:04}.jpg", nbytes, "e") for n in range(images))
    return Shard("0" * 16, "images", objects)


def test_images_are_fetched_in_parallel() -> None:
    store = SlowStore(10)
    assert len(list(read_shard(store, shard_of(60, 10), max_image_bytes=100, readers=6))) == 60
    assert 2 <= store.most_running <= 6


def test_what_is_fetched_ahead_is_bounded() -> None:
    nbytes = 20 << 20
    store = SlowStore(nbytes)
    records = read_shard(store, shard_of(20, nbytes), max_image_bytes=1 << 30)
    next(records)
    time.sleep(0.1)
    assert store.asked <= 5  # the one taken, 64 MiB ahead, and one that is just added


class DeniedStore(SlowStore):
    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        raise AccessDenied(f"{key}: not allowed")


def test_other_storage_errors_end_the_attempt() -> None:
    with pytest.raises(AccessDenied):
        list(read_shard(DeniedStore(1), shard_of(5, 1), max_image_bytes=100))


class PartlyDenied(SlowStore):
    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        if key == "0002.jpg":
            raise AccessDenied(f"{key}: not allowed", hint="restore it")
        return super().get(key, if_match=if_match)

    def stream(self, key: str, *, if_match: str | None = None) -> AbstractContextManager[BinaryIO]:
        raise AccessDenied(f"{key}: not allowed", hint="restore it")


def test_one_denied_image_is_a_row_where_others_can_be_read() -> None:
    shard = shard_of(5, 1)
    records = list(
        read_shard(PartlyDenied(1), shard, max_image_bytes=9, others_readable=lambda: True)
    )
    assert [r.status for r in records] == ["ok", "ok", "missing", "ok", "ok"]
    assert "not allowed" in (records[2].error or "")
    with pytest.raises(AccessDenied):
        list(read_shard(PartlyDenied(1), shard, max_image_bytes=9))


def test_a_denied_tar_is_named_apart_from_an_outage() -> None:
    tar = Shard("0" * 16, "tar", (StoredObject("x.tar", 1, "e"),))
    with pytest.raises(ObjectUnreadable, match=r"x\.tar: not allowed"):
        list(read_shard(PartlyDenied(1), tar, max_image_bytes=9, others_readable=lambda: True))
    with pytest.raises(AccessDenied):
        list(read_shard(PartlyDenied(1), tar, max_image_bytes=9))


def test_a_key_that_no_store_takes_is_an_unsupported_row() -> None:
    objects = tuple(StoredObject(key, 1, "e") for key in ("a.jpg", "b/../c.jpg", "d.jpg"))
    records = list(read_shard(SlowStore(1), Shard("0" * 16, "images", objects), max_image_bytes=9))
    assert [r.status for r in records] == ["ok", "unsupported", "ok"]
    assert "'.' or '..' between slashes" in (records[1].error or "")


def test_what_is_left_out_is_counted_by_reason() -> None:
    store = filled(
        "a.jpg", "b.HEIC", "c.jfif", "notes.txt", "x/labels.TXT", "README", ".hidden", "d.jpg ",
        "__MACOSX/a.jpg", "x/@eaDir/a.jpg", ".ipynb_checkpoints/b.png", "x/._a.jpg", "skip/z.png",
        "more.tar.xz",
    )  # fmt: skip
    left = LeftOut()
    found = [o.key for o in list_source(store, exclude=["skip/**"], left_out=left)]
    assert found == ["a.jpg", "b.HEIC", "c.jfif"]
    assert left.counts == {
        ".txt": 2, "no suffix": 2, ".jpg ": 1, "system files": 4, "filtered": 1, ".xz": 1,
    }  # fmt: skip


def test_reading_stops_when_asked_to() -> None:
    taken: list[str] = []
    records = read_shard(
        SlowStore(1), shard_of(50, 1), max_image_bytes=100, abort=lambda: len(taken) >= 3
    )
    with pytest.raises(Interrupted):
        taken.extend(record.image_id for record in records)
    assert len(taken) == 3


def test_an_abandoned_reader_leaves_no_thread_behind() -> None:
    records = read_shard(SlowStore(1), shard_of(50, 1), max_image_bytes=100)
    next(records)
    records.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 60
    while any(t.name.startswith("fetch") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_real_folders_list_and_group_completely(data_dir: Path) -> None:
    store = open_store(str(data_dir))
    on_disk = {
        path.relative_to(data_dir).as_posix()
        for path in data_dir.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    }
    shards = list(group_images(list_source(store), 256))
    keys = [o.key for shard in shards for o in shard.objects]
    assert len(keys) == len(set(keys))
    assert set(keys) == on_disk
    assert list(tar_shards(list_source(store))) == []


def test_images_beside_a_tar_have_other_ids_than_its_members() -> None:
    store = filled("in/x.tar/a.jpg", "in/x.tar/y.tgz/b.jpg")
    store.put("in/x.tar", tar_of(("a.jpg", b"1"), ("a.jpg", b"2"), ("y.tgz/b.jpg", b"3")))
    store.put("in/x.tar/y.tgz", gzip.compress(tar_of(("b.jpg", b"4"))))
    listed = list(list_source(store))
    shards = [*tar_shards(listed), *group_images(listed, 9)]
    found = [r for s in shards for r in read_shard(store, s, max_image_bytes=99)]
    assert {r.image_id: r.data for r in found} == {
        "in/x.tar/a.jpg": b"1",
        "in/x.tar/a.jpg#2": b"2",
        "in/x.tar/y.tgz/b.jpg": b"3",
        "in/x.tar/y.tgz/b.jpg#1": b"4",
        "in/x.tar/a.jpg#1": b"in/x.tar/a.jpg",
        "in/x.tar/y.tgz/b.jpg#1#1": b"in/x.tar/y.tgz/b.jpg",
    }
    assert len(found) == 6

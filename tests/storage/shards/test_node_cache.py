"""The cache of a machine: whole copies, never more than its size, the least used go first."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from storage.shards.node_cache import NodeCache


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def age(cache: NodeCache, name: str, seconds: float) -> None:
    path = cache._path(name)
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_parts_of_a_copy_are_read_and_what_is_not_there_is_none(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)
    cache.keep("a", b"0123456789")
    assert cache.read("a", 3, 4) == b"3456"
    assert cache.read("a", 8, 4) is None, "shorter than it should be"
    assert cache.read("b", 0, 1) is None
    cache.drop("a")
    assert not cache.has("a")


def test_it_never_exceeds_its_size_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)
    for number, name in enumerate("abc"):
        cache.keep(name, name.encode() * 30)
        age(cache, name, 1000 - number)
    assert cache.read("a", 0, 1) == b"a", "now it is the last one used"
    cache.keep("d", b"d" * 30)
    assert [cache.has(name) for name in "abcd"] == [True, False, True, True]
    assert used(tmp_path) == 90
    cache.keep("e", b"e" * 101)
    assert not cache.has("e"), "larger than all of it"
    assert used(tmp_path) == 90


def test_a_copy_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)

    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        cache.fill("a", 10, broken)
    assert not cache.has("a")
    assert used(tmp_path) == 0
    assert cache.fill("a", 4, lambda file: file.write(b"full") and None)
    assert cache.read("a", 0, 4) == b"full"


def test_of_two_that_make_one_copy_one_writes_and_the_other_waits_or_goes_on(
    tmp_path: Path,
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    writers = []

    def slow(file: BinaryIO) -> None:
        writers.append("slow")
        writing.set()
        assert go_on.wait(60)
        file.write(b"slow")

    def fast(file: BinaryIO) -> None:
        writers.append("fast")
        file.write(b"fast")

    first = threading.Thread(target=NodeCache(tmp_path, 100).fill, args=("a", 4, slow))
    first.start()
    assert writing.wait(60)
    other = NodeCache(tmp_path, 100)
    assert not other.fill("a", 4, fast), "it does not wait"
    waiting = threading.Thread(target=other.fill, args=("a", 4, fast), kwargs={"wait": True})
    waiting.start()
    go_on.set()
    first.join(60)
    waiting.join(60)
    assert writers == ["slow"]
    assert other.read("a", 0, 4) == b"slow"


def test_partial_files_of_dead_writers_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 100)
    cache.keep("a", b"a" * 50)
    dead, live = tmp_path / "00" / "x.dead.part", tmp_path / "00" / "x.live.part"
    dead.parent.mkdir(exist_ok=True)
    for path in (dead, live):
        path.write_bytes(b"p" * 90)
    os.utime(dead, (1, 1))
    cache.keep("b", b"b" * 30)
    assert not dead.exists()
    assert live.exists()
    assert cache.has("a")
    assert cache.has("b")


@pytest.mark.slow
def test_many_small_copies_are_kept_without_looking_at_the_folder_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    copies = NodeCache._copies

    def counted(self: NodeCache) -> list[tuple[float, int, Path]]:
        looked.append(1)
        return copies(self)

    monkeypatch.setattr(NodeCache, "_copies", counted)
    caches = [NodeCache(tmp_path, 10_000) for _ in range(4)]
    for number in range(1200):
        caches[number % 4].keep(str(number), b"x" * 10)
        assert number % 100 or used(tmp_path) <= 10_000
    assert used(tmp_path) <= 10_000
    assert caches[0].has("1199")
    assert not caches[0].has("0")
    assert len(looked) < 1200 / 2

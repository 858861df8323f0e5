"""Folders as object stores: links, pipes, hostile names, crashes, full disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.errors import (
    AccessDenied,
    BucketNotFound,
    NotAtomic,
    ObjectChanged,
    ObjectNotFound,
    StorageError,
    StorageFull,
)
from storage.objects.preflight import check_output
from storage.stores import local_files
from storage.stores.local import LocalStore
from storage.stores.open import open_store
from tests.support.poured import Poured

PROJECT = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(str(root))


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


class TestLinks:
    def test_links_are_listed_and_never_followed(self, root: Path, store: LocalStore) -> None:
        outside = root.parent / "outside"
        outside.mkdir()
        (outside / "secret.jpg").write_bytes(b"secret")
        (root / "real.jpg").write_bytes(b"real")
        (root / "link.jpg").symlink_to(outside / "secret.jpg")
        (root / "folder-link").symlink_to(outside)
        (root / "dangling").symlink_to("nowhere")
        (root / "loop").symlink_to("loop")
        links = {"link.jpg", "folder-link", "dangling", "loop"}
        listed = {o.key: o for o in store.list()}
        assert set(listed) == links | {"real.jpg"}
        assert {k for k, o in listed.items() if o.etag in ("link", "folder link")} == links
        assert listed["folder-link"].etag == "folder link"
        for key in [*links, "folder-link/secret.jpg"]:
            with pytest.raises(StorageError, match="symbolic link"):
                store.get(key)
            with pytest.raises(StorageError, match="symbolic link"):
                store.head(key)
        for write in (store.put, store.create):
            with pytest.raises(StorageError, match="symbolic link"):
                write("folder-link/new.jpg", b"x")
        assert list(store.list("folder-link/")) == []
        assert names_in(outside) == ["secret.jpg"]

    def test_a_put_neither_follows_nor_replaces_a_link(self, root: Path, store: LocalStore) -> None:
        """As root, ``--out /dev/stdout`` would be the end of that."""
        target = root.parent / "target"
        target.write_bytes(b"untouched")
        (root / "key").symlink_to(target)
        with pytest.raises(StorageError, match=r"key is a symbolic link, and is not replaced"):
            store.put("key", b"own")
        assert (root / "key").is_symlink()
        assert target.read_bytes() == b"untouched"
        assert list(store.leftovers()) == []

    def test_a_put_does_not_replace_a_pipe_or_a_device(self, root: Path, store: LocalStore) -> None:
        os.mkfifo(root / "key")
        with pytest.raises(StorageError, match=r"key is a pipe, a socket or a device, and is not"):
            store.put("key", b"own")
        assert (root / "key").is_fifo()

    def test_the_root_itself_may_be_a_link(self, root: Path) -> None:
        (root.parent / "alias").symlink_to(root)
        store = open_store(str(root.parent / "alias"))
        store.put("a/b", b"1")
        assert [o.key for o in store.list()] == ["a/b"]
        assert (root / "a" / "b").read_bytes() == b"1"


class TestNames:
    def test_pipes_do_not_hang(self, root: Path, store: LocalStore) -> None:
        os.mkfifo(root / "pipe.jpg")
        assert [(o.key, o.etag) for o in store.list()] == [("pipe.jpg", "special")]
        with pytest.raises(StorageError, match="pipe"):
            store.get("pipe.jpg")

    def test_names_that_are_not_utf8(self, root: Path, store: LocalStore) -> None:
        (root / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"latin")
        (root / "café.jpg").write_bytes(b"utf-8")
        keys = [o.key for o in store.list()]
        assert [k.encode("utf-8", "surrogateescape") for k in keys] == [
            "café.jpg".encode(),
            b"caf\xe9.jpg",
        ]
        assert [store.get(k) for k in keys] == [b"utf-8", b"latin"]
        with pytest.raises(ObjectNotFound) as caught:
            store.get(keys[1] + "x\n")
        assert str(caught.value).encode("utf-8")  # printable as it is
        assert "\n" not in caught.value.message

    def test_a_url_with_escapes(self, root: Path) -> None:
        odd = root / "100% sure? #1 ü"
        odd.mkdir()
        (odd / "key").write_bytes(b"1")
        store = open_store(f"file://{root}/100%25%20sure%3F%20%231%20%C3%BC")
        assert [o.key for o in store.list()] == ["key"]
        assert open_store(str(odd)).url == store.url
        assert [o.key for o in open_store(store.url).list()] == ["key"]

    def test_our_own_files_are_not_objects(self, root: Path, store: LocalStore) -> None:
        etag = store.put("key", b"1")
        store.replace("key", b"2", if_match=etag)
        (root / ".labelfleet-tmp-1-dead").write_bytes(b"left behind")
        assert [o.key for o in store.list()] == ["key"]
        for name in (".labelfleet-tmp-1-dead", ".labelfleet-lock", "a/.labelfleet-lock"):
            with pytest.raises(StorageError):
                store.put(name, b"x")

    @pytest.mark.slow
    def test_deep_trees(self, root: Path, store: LocalStore) -> None:
        """Deeper than Python recurses."""
        key = "/".join(["d"] * 1500 + ["key"])
        try:
            store.put(key, b"1")
            assert [o.key for o in store.list()] == [key]
            assert store.get(key) == b"1"
        finally:  # deeper than shutil.rmtree, and so pytest, can remove
            subprocess.run(["rm", "-rf", str(root / "d")], check=True)

    def test_a_file_where_a_folder_is_needed(self, store: LocalStore) -> None:
        store.put("a", b"1")
        store.put("b/c", b"1")
        for verb in (store.put, store.create):
            with pytest.raises(StorageError, match="folder"):
                verb("a/b", b"2")
        with pytest.raises(StorageError, match="folder"):
            store.put("b", b"2")
        assert [o.key for o in store.list()] == ["a", "b/c"]


class TestRoots:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(BucketNotFound, match="no/such"):
            list(open_store(str(tmp_path / "no/such")).list())

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "one.tar").write_bytes(b"")
        with pytest.raises(BucketNotFound, match="not a folder"):
            list(open_store(str(tmp_path / "one.tar")).list())

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")
    def test_not_permitted(self, root: Path, store: LocalStore) -> None:
        (root / "closed").mkdir(mode=0)
        with pytest.raises(AccessDenied, match="closed"):
            list(store.list())
        with pytest.raises(AccessDenied, match="closed"):
            store.put("closed/key", b"1")


class TestChanges:
    def test_a_file_rewritten_while_it_streams(self, root: Path, store: LocalStore) -> None:
        (root / "key").write_bytes(bytes(8 << 20))
        with store.stream("key") as source:
            assert source.read(10) == bytes(10)
            (root / "key").write_bytes(b"\1" * (8 << 20))
            with pytest.raises(ObjectChanged):
                source.read()
            with pytest.raises(ObjectChanged):
                source.read()

    def test_a_file_replaced_while_it_streams_is_read_as_it_was(self, store: LocalStore) -> None:
        store.put("key", bytes(8 << 20))
        with store.stream("key") as source:
            assert source.read(10) == bytes(10)
            store.put("key", b"new")
            assert source.read() == bytes((8 << 20) - 10)

    def test_a_touched_file_is_another_version(self, root: Path, store: LocalStore) -> None:
        etag = store.put("key", b"1")
        assert etag == f"1-{(root / 'key').stat().st_mtime_ns}"
        os.utime(root / "key", ns=(0, 12345))
        assert store.head("key").etag == "1-12345"
        with pytest.raises(ObjectChanged):
            store.get("key", if_match=etag)


_WRITER = """
import sys
from pathlib import Path
from storage.stores.open import open_store
from tests.support.poured import Poured
print("ready", flush=True)
getattr(open_store(sys.argv[1]), sys.argv[2])("run/part", Path(sys.argv[3]))
"""


@pytest.mark.parametrize("verb", ["create", "put"])
def test_a_writer_killed_in_the_middle_leaves_no_object(
    root: Path, store: LocalStore, verb: str
) -> None:
    pipe = root.parent / "pipe"
    os.mkfifo(pipe)
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(root), verb, str(pipe)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    with pipe.open("wb") as body:
        body.write(bytes(3 << 20))
        body.flush()
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
    assert list(store.list()) == []
    store.create("run/part", b"whole")
    assert [(o.key, o.nbytes) for o in store.list()] == [("run/part", 5)]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory; skips where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small", "size=1m") as folder:
        yield folder


def test_a_disk_that_may_only_be_read(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "cd", "ro") as folder,
        pytest.raises(AccessDenied, match="permissions"),
    ):
        check_output(open_store(str(folder / "run")))


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    store = open_store(str(small_disk))
    kept = store.put("kept", b"old")
    spool = tmp_path / "spool"
    spool.write_bytes(bytes(2 << 20))
    for body in (spool, bytes(2 << 20), Poured([bytes(1 << 19)] * 4)):
        with pytest.raises(StorageFull, match="no space"):
            store.create("part", body)
        with pytest.raises(StorageFull):
            store.put("kept", body)
        with pytest.raises(StorageFull):
            store.replace("kept", body, if_match=kept)
    assert [(o.key, o.etag) for o in store.list()] == [("kept", kept)]
    assert not [n for n in names_in(small_disk) if n.startswith(local_files.TEMPORARY_PREFIX)]
    store.create("part", bytes(1000))


def test_a_body_that_cannot_be_read_creates_no_object(tmp_path: Path, store: LocalStore) -> None:
    with pytest.raises(ObjectNotFound, match="no such spool"):
        store.create("key", tmp_path / "no such spool")
    assert list(store.list()) == []


def test_a_file_system_without_hard_links(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # such a file system cannot be mounted in a test
    with pytest.raises(NotAtomic, match="hard links"):
        check_output(store)
    assert names_in(root) == []


def test_one_tick_of_a_coarse_clock_still_makes_two_versions(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files.time, "time_ns", lambda: 1_000_000_000)
    first = store.put("lock", b"1")
    second = store.replace("lock", b"2", if_match=first)
    with pytest.raises(ObjectChanged):
        store.replace("lock", b"3", if_match=first)
    assert store.get("lock", if_match=second) == b"2"


class TestLeftovers:
    def test_what_a_dead_writer_left_is_found_and_can_be_deleted(
        self, root: Path, store: LocalStore
    ) -> None:
        store.put("deep/er/object", b"whole")
        (root / "deep/er/.labelfleet-tmp-1-ab").write_bytes(b"half")
        (left,) = store.leftovers()
        assert (left.key, left.nbytes) == ("deep/er/.labelfleet-tmp-1-ab", 4)
        assert left.modified_at is not None
        assert [o.key for o in store.list()] == ["deep/er/object"]
        store.delete(left.key)
        assert list(store.leftovers()) == []
        assert [o.key for o in store.list()] == ["deep/er/object"]

    def test_locks_are_not_leftovers_and_only_delete_takes_such_a_name(
        self, root: Path, store: LocalStore
    ) -> None:
        store.put("key", b"1")
        assert (root / ".labelfleet-lock").exists()
        assert list(store.leftovers()) == []
        for name in (".labelfleet-lock", "deep/.labelfleet-lock"):
            with pytest.raises(StorageError):
                store.delete(name)
        (root / ".labelfleet-tmp-1-ab").write_bytes(b"half")
        with pytest.raises(StorageError):
            store.get(".labelfleet-tmp-1-ab")
        with pytest.raises(StorageError):
            store.put(".labelfleet-tmp-1-ab", b"mine")

    def test_a_folder_that_is_not_there_has_none(self, root: Path) -> None:
        assert list(LocalStore(str(root / "nowhere")).leftovers()) == []

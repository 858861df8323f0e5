"""Other schemes through fsspec: a real HTTP server to read from, and a folder to write to."""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from storage.errors import (
    AccessDenied,
    BucketNotFound,
    NotAtomic,
    ObjectChanged,
    ObjectNotFound,
    ShortRead,
    StorageError,
    StorageUnavailable,
)
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.fsspec_store import FsspecStore
from storage.stores.open import open_object, open_store
from storage.urls import Location
from tests.support.poured import Poured
from tests.support.servers.proxy import FaultyProxy, Rule, faulty_proxy

CONTENT = bytes(range(256)) * 2000
OPTIONS = StorageOptions(attempts=3)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.tar").write_bytes(CONTENT)
    (folder / "sub-a.tar").write_bytes(b"a")
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture
def site(served: Path) -> Iterator[str]:
    """http.server of the standard library: whole objects only, no ranges, no etags."""
    handler = functools.partial(_Quiet, directory=str(served))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def proxy(site: str) -> Iterator[FaultyProxy]:
    with faulty_proxy(site) as running:
        yield running


class TestHttp:
    def test_it_reads(self, site: str) -> None:
        store = open_store(site, OPTIONS)
        assert [(o.key, o.nbytes) for o in store.list()] == [
            ("empty", 0),
            ("sub-a.tar", 1),
            ("sub/b.tar", len(CONTENT)),
        ]
        assert [o.key for o in store.list("sub/")] == ["sub/b.tar"]
        assert store.get("sub/b.tar") == CONTENT
        assert store.get("empty") == b""
        with store.stream("sub/b.tar", if_match=store.head("sub/b.tar").etag) as source:
            assert source.read(1000) + source.read() == CONTENT
        copy = pickle.loads(pickle.dumps(store))
        assert copy.get("sub-a.tar") == b"a"

    def test_one_object(self, site: str) -> None:
        store, key = open_object(f"{site}/sub/b.tar?token=hunter2", OPTIONS)
        assert store.get(key) == CONTENT

    def test_what_is_not_there(self, site: str) -> None:
        store = open_store(site, OPTIONS)
        with pytest.raises(ObjectNotFound, match=r"no\.tar"):
            store.get("no.tar")
        with pytest.raises(BucketNotFound):
            list(open_store(f"{site}/nowhere", OPTIONS).list())

    def test_it_cannot_hold_a_run(self, site: str) -> None:
        store = open_store(site, OPTIONS)
        assert not store.atomic_create
        for refused in (
            lambda: store.create("key", b"1"),
            lambda: store.replace("key", b"1", if_match="e"),
            lambda: check_output(store),
        ):
            with pytest.raises(NotAtomic):
                refused()
        with pytest.raises(StorageError):
            store.presign("key", expires_s=60)

    def test_trouble(self, proxy: FaultyProxy) -> None:
        store = open_store(proxy.endpoint_url, OPTIONS)
        proxy.rules.append(Rule("answer", "GET", status=503, path_part="b.tar"))
        assert store.get("sub/b.tar") == CONTENT
        proxy.rules[:] = [Rule("answer", "GET", status=503, times=None)]
        with pytest.raises(StorageUnavailable):
            store.get("sub/b.tar")
        proxy.rules[:] = [
            Rule("answer", "GET", status=403, times=None),
            Rule("answer", "HEAD", status=403, times=None),
        ]
        with pytest.raises(AccessDenied) as caught:
            store.get("sub/b.tar?token=hunter2")
        assert "hunter2" not in str(caught.value)
        proxy.rules[:] = [Rule("cut", "GET", times=None, keep_bytes=1000)]
        with pytest.raises(StorageError), store.stream("sub/b.tar") as source:
            source.read()

    def test_a_server_that_does_not_listen(self) -> None:
        with pytest.raises(StorageUnavailable):
            open_store("http://127.0.0.1:9", StorageOptions(attempts=1)).get("key")


class TestThroughADriver:
    """The same class over fsspec's own local driver, which can write."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        (tmp_path / "root").mkdir()
        return FsspecStore(Location("file", "", str(tmp_path / "root")), OPTIONS)

    def test_verbs(self, store: ObjectStore, tmp_path: Path) -> None:
        spool = tmp_path / "spool"
        spool.write_bytes(CONTENT)
        old = store.put("a/b", b"first")
        new = store.put("a/b", spool)
        store.put("a-b", Poured([b"made ", b"meanwhile"]))
        assert store.get("a-b") == b"made meanwhile"
        with pytest.raises(StorageError, match="trouble"):
            store.put("never", Poured([b"part"], error=StorageError("trouble")))
        store.put("a-b", b"")
        assert [(o.key, o.nbytes) for o in store.list()] == [("a-b", 0), ("a/b", len(CONTENT))]
        assert store.get("a/b", if_match=new) == CONTENT
        assert store.get_range("a/b", 300, 500, if_match=new) == CONTENT[300:800]
        assert store.get_range("a/b", 300, 0) == b""
        with pytest.raises(ObjectChanged):
            store.get("a/b", if_match=old)
        with pytest.raises(ShortRead):
            store.get_range("a/b", len(CONTENT) - 1, 2)
        for key in ("a", "missing", "a/b/c"):
            with pytest.raises(ObjectNotFound):
                store.get(key)
        store.delete("a/b")
        store.delete("a/b")
        assert [o.key for o in store.list()] == ["a-b"]

    def test_keys_stay_inside(self, store: ObjectStore) -> None:
        for key in ("../spool", "a/../../spool", "a/", ""):
            with pytest.raises(StorageError):
                store.put(key, b"x")
            with pytest.raises(StorageError):
                store.get(key)

    def test_a_file_that_changes_while_it_streams(self, store: ObjectStore) -> None:
        etag = store.put("key", bytes(3 << 20))
        with store.stream("key", if_match=etag) as source:
            assert source.read(10) == bytes(10)
            store.put("key", bytes(4 << 20))
            with pytest.raises(StorageError):
                source.read()

"""The verbs against a plain dict, and listings against sorting: random sequences and trees."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from storage.errors import AlreadyExists, ObjectChanged, ObjectNotFound, ShortRead, StorageError
from storage.objects.protocols import ObjectStore
from storage.s3.ordered import ordered_entries
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore

# No key is a folder of another: what only object stores can hold is not asked of folders.
KEYS = st.sampled_from(["a", "a-", "a.b", "b/a", "b/a-", "b/c/d", "b-/x", "b0", "é/ü", "new\nline"])
BODIES = st.binary(max_size=40)


class StoreMachine(RuleBasedStateMachine):
    """Subclasses give ``open``. ``model`` maps keys to (content, etag)."""

    def open(self) -> ObjectStore:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.store = self.open()
        self.model: dict[str, tuple[bytes, str]] = {}
        self.stale: dict[str, str] = {}

    def _record(self, key: str, body: bytes, etag: str) -> None:
        if key in self.model:
            assert etag != self.model[key][1]
            self.stale[key] = self.model[key][1]
        self.model[key] = (body, etag)

    @rule(key=KEYS, body=BODIES)
    def create(self, key: str, body: bytes) -> None:
        if key in self.model:
            with pytest.raises(AlreadyExists):
                self.store.create(key, body)
        else:
            self._record(key, body, self.store.create(key, body))

    @rule(key=KEYS, body=BODIES)
    def put(self, key: str, body: bytes) -> None:
        self._record(key, body, self.store.put(key, body))

    @rule(key=KEYS, body=BODIES, fresh=st.booleans())
    def replace(self, key: str, body: bytes, fresh: bool) -> None:
        if fresh and key in self.model:
            etag = self.store.replace(key, body, if_match=self.model[key][1])
            self._record(key, body, etag)
        else:
            with pytest.raises(ObjectChanged):
                self.store.replace(key, body, if_match=self.stale.get(key, "none"))

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.model.pop(key, None)

    @rule(key=KEYS, fresh=st.booleans())
    def read(self, key: str, fresh: bool) -> None:
        if key not in self.model:
            with pytest.raises(ObjectNotFound):
                self.store.get(key)
            return
        content, etag = self.model[key]
        if fresh:
            assert self.store.get(key, if_match=etag) == content
            with self.store.stream(key, if_match=etag) as source:
                assert source.read() == content
        elif key in self.stale:
            with pytest.raises(ObjectChanged):
                self.store.get(key, if_match=self.stale[key])

    @rule(key=KEYS, offset=st.integers(0, 45), nbytes=st.integers(0, 45))
    def read_range(self, key: str, offset: int, nbytes: int) -> None:
        if key not in self.model:
            return
        content = self.model[key][0]
        if offset + nbytes <= len(content):
            assert self.store.get_range(key, offset, nbytes) == content[offset : offset + nbytes]
        else:
            with pytest.raises(ShortRead):
                self.store.get_range(key, offset, nbytes)

    @rule(prefix=st.sampled_from(["a", "b/", "b", "b/a", "é", "none/at/all", "b/c/d/"]))
    def list_prefix(self, prefix: str) -> None:
        found = [o.key for o in self.store.list(prefix)]
        assert found == [k for k in self._ordered() if k.startswith(prefix)]

    def _ordered(self) -> list[str]:
        return sorted(self.model, key=str.encode)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        listed = [(o.key, o.nbytes, o.etag) for o in self.store.list()]
        assert listed == [(k, len(self.model[k][0]), self.model[k][1]) for k in self._ordered()]


class MemoryMachine(StoreMachine):
    def open(self) -> ObjectStore:
        return MemoryStore()


class LocalMachine(StoreMachine):
    def open(self) -> ObjectStore:
        self.folder = tempfile.mkdtemp()
        return LocalStore(self.folder)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestMemoryMachine = MemoryMachine.TestCase
TestLocalMachine = LocalMachine.TestCase
# Every step syncs the disk.
TestLocalMachine.settings = settings(max_examples=25, stateful_step_count=25)
TestLocalMachine = pytest.mark.slow(TestLocalMachine)

NAMES = st.text(st.sampled_from("ab-./0~é\uffff😀"), min_size=1, max_size=6)
TREES = st.sets(NAMES.filter(lambda k: not {"", ".", ".."} & set(k.split("/"))), max_size=25)


def as_tree(names: set[str]) -> list[str]:
    """Those of the names that can be files together, ordered by key."""
    folders = {n[:i] for n in names for i, c in enumerate(n) if c == "/"}
    return sorted(names - folders, key=str.encode)


@given(TREES, st.text(st.sampled_from("ab-./"), max_size=3))
def test_a_folder_is_listed_by_key(names: set[str], prefix: str) -> None:
    tree = as_tree(names)
    with tempfile.TemporaryDirectory() as folder:
        for key in tree:
            path = Path(folder) / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        store = LocalStore(folder)
        assert [o.key for o in store.list()] == tree
        assert [o.key for o in store.list(prefix)] == [k for k in tree if k.startswith(prefix)]


def folder_walking_server(keys: list[str], page_size: int) -> Any:
    """ListObjectsV2 as SeaweedFS answers it: depth first, siblings ordered by bare name."""

    def pages(prefix: str, delimiter: str) -> Iterator[Mapping[str, Any]]:
        found = [k for k in keys if k.startswith(prefix)]
        if delimiter:
            cut = {k: k.find("/", len(prefix)) for k in found}
            found = list({k if cut[k] < 0 else k[: cut[k] + 1] for k in found})
        found.sort(key=lambda k: k.rstrip("/").encode().split(b"/"))
        headers = {"ResponseMetadata": {"HTTPHeaders": {"server": "SeaweedFS 30GB 4.48"}}}
        for start in range(0, len(found), page_size):
            part = found[start : start + page_size]
            yield {
                **headers,
                "Contents": [{"Key": k} for k in part if not (delimiter and k.endswith("/"))],
                "CommonPrefixes": [{"Prefix": k} for k in part if delimiter and k.endswith("/")],
            }

    return pages


@given(TREES, st.integers(1, 4), st.text(st.sampled_from("ab-./"), max_size=3))
def test_a_server_that_walks_folders_is_listed_by_key(
    names: set[str], page_size: int, prefix: str
) -> None:
    tree = as_tree(names)
    found = ordered_entries(folder_walking_server(tree, page_size), prefix, "s3://bucket")
    assert [e["Key"] for e in found] == [k for k in tree if k.startswith(prefix)]


def test_a_server_without_any_order_is_refused() -> None:
    def pages(prefix: str, delimiter: str) -> Iterator[Mapping[str, Any]]:
        yield {"Contents": [{"Key": "b"}, {"Key": "c"}]}
        yield {"Contents": [{"Key": "a"}]}

    found = ordered_entries(pages, "", "s3://bucket")
    assert [next(found)["Key"], next(found)["Key"]] == ["b", "c"]
    with pytest.raises(StorageError, match="out of order"):
        next(found)

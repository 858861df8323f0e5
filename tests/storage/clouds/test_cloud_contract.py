"""gs:// and az:// keep the promises of every object store, against real servers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from storage.errors import RunLocked, StorageError
from storage.objects.protocols import ObjectStore
from storage.runs.lock import run_lock
from storage.stores.open import open_store
from tests.storage.objects.test_contract import ODD_NAMES, TREE, WRITERS, StoreContract, keys, race
from tests.support.servers.azurite import PROGRAM, AzuriteServer, azurite_server, credentials_env


@pytest.fixture(scope="module")
def azurite() -> Iterator[AzuriteServer]:
    if not PROGRAM.exists():
        pytest.skip("needs Azurite (node and npm): make azurite")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials_env().items():
            patch.setenv(name, value)
        with azurite_server() as server:
            yield server


@pytest.mark.slow
class TestAzurite(StoreContract):
    rounds = 10
    # Refused with a reason: what XML cannot hold, and the backslash, which Azure takes for a slash.
    odd_names: Sequence[str] = [n for n in ODD_NAMES if n.isprintable() and "\\" not in n]
    tree: Sequence[str] = [key.replace("\uffff", "\ufffd") for key in TREE]

    @pytest.fixture
    def store(self, azurite: AzuriteServer) -> ObjectStore:
        return azurite.fresh_store("some/prefix")

    def test_a_prefix_ends_at_a_slash(self, azurite: AzuriteServer) -> None:
        container, options = azurite.fresh_bucket(), azurite.options
        open_store(f"az://{container}/run", options).put("key", b"1")
        open_store(f"abfs://{container}/runner", options).put("key", b"2")
        whole = open_store(f"az://{container}/", options)
        assert keys(open_store(f"az://{container}/run/", options)) == ["key"]
        assert keys(whole) == ["run/key", "runner/key"]
        assert keys(whole, "run") == ["run/key", "runner/key"]

    @pytest.mark.parametrize("key", ["new\nline", "a\\b", "a//b", "/a", "a\uffff"])
    def test_names_that_it_would_change_are_refused(self, azurite: AzuriteServer, key: str) -> None:
        store = azurite.fresh_store()
        with pytest.raises(StorageError, match="rename the object"):
            store.put(key, b"1")
        assert keys(store) == []

    def test_one_process_at_a_time_holds_the_lock(self, store: ObjectStore) -> None:
        with run_lock(store, "first"):

            def take(number: int) -> str:
                with run_lock(store, f"other {number}"):
                    return "held"

            outcomes = race(WRITERS, take)
            assert [type(outcome) for outcome in outcomes] == [RunLocked] * WRITERS
        assert keys(store) == []
        with run_lock(store, "next") as lock:
            lock.check()

    def test_a_lock_that_another_took_over_is_lost(self, store: ObjectStore) -> None:
        with run_lock(store, "first", lease_s=3) as lock:
            etag = store.put("lock.json", b"{}")

            def watch() -> None:
                for _ in range(600):
                    time.sleep(0.1)
                    lock.check()

            with pytest.raises(RunLocked, match="took it over"):
                watch()
        assert store.head("lock.json").etag == etag

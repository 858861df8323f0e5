"""gs:// and az:// keep the promises of every object store, against real servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from storage.errors import StorageError
from storage.objects.protocols import ObjectStore
from storage.stores.open import open_store
from tests.storage.objects.test_contract import ODD_NAMES, TREE, StoreContract, keys
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

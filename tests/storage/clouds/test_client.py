"""Which server gs:// and az:// mean, and what is said when that does not work."""

from __future__ import annotations

import pytest

from storage.clouds.client import CloudPlace, endpoint_of
from storage.clouds.ordered import by_code_point
from storage.errors import ConfigError, StorageError, StorageUnavailable
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_store
from storage.urls import parse_url

VARIABLES = ("STORAGE_EMULATOR_HOST", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT")


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("url", "place", "shown"),
    [
        ("gs://bucket/a/", CloudPlace("gs", "bucket"), "gs://bucket/a"),
        ("gcs://bucket", CloudPlace("gs", "bucket"), "gs://bucket"),
        ("abfs://box/a", CloudPlace("az", "box"), "az://box/a"),
        (
            "abfss://box@account.dfs.core.windows.net/a",
            CloudPlace("az", "box", "account"),
            "az://box@account.dfs.core.windows.net/a",
        ),
    ],
)
def test_a_url_names_bucket_and_account(url: str, place: CloudPlace, shown: str) -> None:
    assert CloudPlace.of(parse_url(url)) == place
    store = open_store(url)
    assert store.url == open_store(store.url).url == shown
    assert store.atomic_create


@pytest.mark.parametrize(
    "endpoint", ["http://10.0.0.1:9000", "http://evil.example/127.0.0.1", "ftp://127.0.0.1"]
)
@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_plain_http_is_for_this_machine(scheme: str, endpoint: str) -> None:
    with pytest.raises(ConfigError, match="neither https"):
        endpoint_of(scheme, StorageOptions(endpoint_url=endpoint))


def test_credentials_do_not_belong_in_an_endpoint() -> None:
    for endpoint in ("https://me:hunter2@host", "https://host/?sig=hunter2"):
        with pytest.raises(ConfigError, match="credentials") as caught:
            endpoint_of("az", StorageOptions(endpoint_url=endpoint))
        assert "hunter2" not in str(caught.value)


def test_the_clouds_own_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own_s3 = StorageOptions(endpoint_url="https://minio.example")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:4443")
    assert endpoint_of("gs", own_s3) == "http://localhost:4443"
    assert endpoint_of("az", own_s3) == "https://minio.example"
    assert endpoint_of("az", StorageOptions()) is None


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_server_that_is_not_there_is_unavailable(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "bm9uZQ==")
    options = StorageOptions(endpoint_url="http://127.0.0.1:9", attempts=1)
    store = open_store(f"{scheme}://bucket/a", options)
    for verb in (lambda: store.head("k"), lambda: store.create("k", b""), lambda: [*store.list()]):
        with pytest.raises(StorageUnavailable, match="could not be reached"):
            verb()


def test_listings_by_utf16_are_brought_into_order() -> None:
    tree = ["a", "z/b", "z/\ufffd", "z/\ufffd/\ue000", "z/😀", "z/😀/a", "z0", "é", "\ue000x", "😀"]
    by_units = sorted(tree, key=lambda key: key.encode("utf-16-be"))
    assert by_units != tree
    found = by_code_point([{"path": key} for key in by_units], "az://box")
    assert [entry["path"] for entry in found] == sorted(tree) == tree
    with pytest.raises(StorageError, match="out of order"):
        list(by_code_point([{"path": "a/b"}, {"path": "a-b"}], "az://box"))

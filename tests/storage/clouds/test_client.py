"""Which server gs:// and az:// mean, and what is said when that does not work."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from obstore import exceptions as cloud

from storage.clouds.client import CloudPlace, endpoint_of
from storage.clouds.errors import from_cloud_error
from storage.clouds.ordered import by_code_point
from storage.errors import (
    AccessDenied,
    ConfigError,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from storage.objects import native_threads
from storage.objects.protocols import ObjectStore, StorageOptions
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


# Complete, but its key is none.
SERVICE_ACCOUNT = json.dumps(
    {"type": "service_account", "private_key": "hunter2", "private_key_id": "1",
     "client_email": "a@b", "project_id": "p", "client_id": "c"}
)  # fmt: skip


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith(("AZURE_", "GOOGLE_", "IDENTITY_", "MSI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def verbs(store: ObjectStore) -> list[Callable[[], object]]:
    return [
        lambda: store.head("k"),
        lambda: store.get("k"),
        lambda: store.create("k", b""),
        lambda: [*store.list()],
        lambda: store.delete("k"),
    ]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "AZURE_STORAGE_ACCOUNT_NAME"),
        ({"AZURE_STORAGE_ACCOUNT_KEY": "not base64"}, "AZURE_STORAGE_ACCOUNT_KEY"),
        ({"AZURE_STORAGE_SAS_TOKEN": "hunter2"}, "_SAS_TOKEN"),
        ({"AZURE_FEDERATED_TOKEN_FILE": "/none", "AZURE_CLIENT_ID": "a", "AZURE_TENANT_ID": "b"},
         "managed identity"),
    ],
)  # fmt: skip
def test_azures_chain_is_named_where_it_ends(
    variables: dict[str, str], named: str, no_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if variables:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    for verb in verbs(open_store("az://box/a", StorageOptions(attempts=1))):
        with pytest.raises(AccessDenied, match="no usable credentials for az://box/a") as caught:
            verb()
        assert named in str(caught.value.hint)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{}", "{damaged", SERVICE_ACCOUNT])
def test_googles_chain_is_named_where_it_ends(
    content: str | None,
    no_credentials: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    for verb in verbs(open_store("gs://bucket/a", StorageOptions(attempts=1))):
        with pytest.raises(AccessDenied, match="no usable credentials for gs://bucket/a") as caught:
            verb()
        assert "GOOGLE_APPLICATION_CREDENTIALS" in str(caught.value.hint)


class _Refuses(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(int(self.path.strip("/").partition("?")[0]))

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize("status", [400, 403, 404])
def test_what_a_metadata_server_answers_is_not_about_the_object(
    status: int, no_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """404 there must not say that there is no such object."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"http://127.0.0.1:{server.server_port}/{status}")
        monkeypatch.setenv("IDENTITY_HEADER", "none")
        for verb in verbs(open_store("az://box/a", StorageOptions(attempts=1))):
            with pytest.raises(AccessDenied, match="no usable credentials for az://box/a"):
                verb()
        server.shutdown()


def test_a_key_that_reads_like_an_error_of_the_chain_is_a_key() -> None:
    for key in ("token request", "service account file", "Generic GCS error: Invalid Access Key"):
        error = cloud.NotFoundError(f"Object at location {key} not found: 404")
        assert isinstance(from_cloud_error(error, f"gs://b/{key}", "gs"), ObjectNotFound)


def test_listings_by_utf16_are_brought_into_order() -> None:
    tree = ["a", "z/b", "z/\ufffd", "z/\ufffd/\ue000", "z/😀", "z/😀/a", "z0", "é", "\ue000x", "😀"]
    by_units = sorted(tree, key=lambda key: key.encode("utf-16-be"))
    assert by_units != tree
    found = by_code_point([{"path": key} for key in by_units], "az://box")
    assert [entry["path"] for entry in found] == sorted(tree) == tree
    with pytest.raises(StorageError, match="out of order"):
        list(by_code_point([{"path": "a/b"}, {"path": "a-b"}], "az://box"))


@pytest.mark.parametrize("url", ["gs://bucket", "az://box"])
def test_a_forked_process_is_told_so_instead_of_hanging(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_threads, "_first_used_in", os.getppid())
    with pytest.raises(StorageError, match="in a forked process") as caught:
        open_store(url).get("key")
    assert "spawn" in str(caught.value)


@pytest.mark.parametrize("verb", ["get", "list"])
def test_ctrl_c_is_heard_while_a_server_does_not_answer(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        store = open_store("gs://bucket", StorageOptions(read_timeout_s=600))
        verbs = {"get": lambda: store.get("key"), "list": lambda: list(store.list())}
        asked = threading.Event()

        def interrupt() -> None:
            with silent.accept()[0]:
                os.kill(os.getpid(), signal.SIGINT)
                asked.wait(60)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(interrupt)
            try:
                with pytest.raises(KeyboardInterrupt):
                    verbs[verb]()
                assert not told.done()  # still unanswered
            finally:
                asked.set()
                signal.signal(signal.SIGINT, before)

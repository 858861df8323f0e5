"""Small reads through obstore: the same bytes and errors as boto3's, whatever happens."""

from __future__ import annotations

import datetime
import ipaddress
import os
import pickle
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from storage.errors import (
    AccessDenied,
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    ShortRead,
    StorageError,
    StorageUnavailable,
)
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.s3 import quick_reads
from storage.s3.quick_reads import MOST_BYTES, QuickReads
from storage.stores.open import open_store
from tests.support.servers.proxy import FaultyProxy, Rule, faulty_proxy
from tests.support.servers.s3 import S3Server

IN_MAIN_THREAD = quick_reads.in_main_thread
CONTENT = bytes(range(256)) * 400
AWKWARD_KEYS = (
    "plain.jpg",
    "a b+c&d=e;f,g@h:i$j.jpg",
    "100%.jpg",
    "%2e%2E%2f%00.jpg",
    "ü/日本/🙂.jpg",
    "e\u0301 and é.jpg",
    "what?#fragment.jpg",
    "'quoted' \"twice\" <tag> [x] {y} |z| ^ ` ~.jpg",
    "folder.jpg/.hidden.jpg",
    "...jpg",
)


class Calls:
    """Counts what obstore is asked for, and what it was good for."""

    def __init__(self) -> None:
        self.sent = self.answered = 0
        self._get = obstore.get

    def get(self, *given: Any, **named: Any) -> Any:
        self.sent += 1
        reply = self._get(*given, **named)
        self.answered += 1
        return reply


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    monkeypatch.setattr(obstore, "get", counted.get)
    return counted


@pytest.fixture(autouse=True)
def _as_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_reads, "in_main_thread", lambda: False)


@pytest.fixture
def store(bucket: str, proxy: FaultyProxy) -> ObjectStore:
    """Through the proxy; it knows the way already."""
    options = StorageOptions(endpoint_url=proxy.endpoint_url, attempts=3, read_timeout_s=20)
    opened = open_store(f"s3://{bucket}/run", options)
    know_the_way(opened)
    return opened


def know_the_way(store: ObjectStore) -> None:
    """Read once, as boto3 does."""
    etag = store.put("first", b"1")
    assert store.get("first", if_match=etag) == b"1"


def read_twice(server: S3Server, bucket: str) -> None:
    """Read by a store of its own; only the second read could go through obstore."""
    store = open_store(f"s3://{bucket}/run", server.options)
    know_the_way(store)
    know_the_way(store)


@pytest.mark.slow
class TestSameBytes:
    @pytest.fixture(params=["moto", "weed"])
    def server(self, request: pytest.FixtureRequest) -> S3Server:
        found: S3Server = request.getfixturevalue(f"{request.param}_s3")
        return found

    def test_whole_objects_and_ranges_under_any_key(self, server: S3Server, calls: Calls) -> None:
        store = server.fresh_store("some/pre fix+%")
        know_the_way(store)
        assert calls.sent == 0
        for number, key in enumerate(AWKWARD_KEYS, start=1):
            body = CONTENT + key.encode()
            etag = store.put(key, body)
            assert store.get(key, if_match=etag) == body
            assert store.get_range(key, 7, 1000, if_match=etag) == body[7:1007]
            assert calls.answered == 2 * number, key
        etag = store.put("empty", b"")
        assert store.get("empty", if_match=etag) == b""

    def test_all_errors_are_boto3s(self, server: S3Server, calls: Calls) -> None:
        store = server.fresh_store()
        know_the_way(store)
        old = store.put("key", b"old content")
        new = store.put("key", b"new content!")
        expected: list[tuple[type[LabelfleetError], Callable[[], bytes]]] = [
            (ObjectChanged, lambda: store.get("key", if_match=old)),
            (ObjectChanged, lambda: store.get_range("key", 0, 3, if_match=old)),
            (ShortRead, lambda: store.get_range("key", 4, 100, if_match=new)),
            (ShortRead, lambda: store.get_range("key", 100, 1, if_match=new)),
            (ObjectNotFound, lambda: store.get("missing", if_match=new)),
            (StorageError, lambda: store.get("../key", if_match=new)),
        ]
        for kind, read in expected:
            with pytest.raises(kind) as caught:
                read()
            assert type(caught.value) is kind
        assert store.get("key", if_match=new) == b"new content!"
        assert calls.answered >= 1

    def test_many_threads_begin_at_once(self, server: S3Server, calls: Calls) -> None:
        writer = server.fresh_store()
        etags = {f"{n}.jpg": writer.put(f"{n}.jpg", CONTENT[n:]) for n in range(32)}
        reader: ObjectStore = pickle.loads(pickle.dumps(writer))
        begin = threading.Barrier(16)

        def read(number: int) -> bool:
            if number < 16:
                begin.wait(30)
            key = f"{number % 32}.jpg"
            return reader.get(key, if_match=etags[key]) == CONTENT[number % 32 :]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(read, range(128)))
        assert calls.answered >= 96


@pytest.mark.slow
class TestFaults:
    @pytest.mark.parametrize(
        "rule",
        [
            Rule("cut", "GET", keep_bytes=5000),
            Rule("cut", "GET", keep_bytes=0),
            Rule("answer", "GET", status=503, code="SlowDown"),
            Rule("answer", "GET", status=403, code="AccessDenied"),
            Rule("answer", "GET", status=200, code="NotTheObject"),
            Rule("reset", "GET"),
            Rule("close", "GET"),
            Rule("ignore_range", "GET"),
        ],
        ids=lambda rule: f"{rule.effect}-{rule.status}-{rule.keep_bytes}",
    )
    def test_what_goes_wrong_once_is_nothing(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy, calls: Calls, rule: Rule
    ) -> None:
        etag = direct.put("image.jpg", CONTENT)
        proxy.rules.append(replace(rule))
        assert store.get_range("image.jpg", 10, 9000, if_match=etag) == CONTENT[10:9010]
        proxy.rules[:] = [replace(rule)]
        assert store.get("image.jpg", if_match=etag) == CONTENT
        assert calls.sent == 2

    def test_a_standstill_is_noticed(
        self, bucket: str, direct: ObjectStore, proxy: FaultyProxy, calls: Calls
    ) -> None:
        options = StorageOptions(endpoint_url=proxy.endpoint_url, attempts=3, read_timeout_s=0.5)
        store = open_store(f"s3://{bucket}/run", options)
        know_the_way(store)
        etag = direct.put("image.jpg", CONTENT)
        proxy.rules.append(Rule("hang", "GET"))
        assert store.get("image.jpg", if_match=etag) == CONTENT
        assert (calls.sent, calls.answered) == (1, 0)

    def test_a_reply_of_another_version_is_not_taken(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy, calls: Calls
    ) -> None:
        """A cache between us and the bucket that does not look at If-Match."""
        proxy.remembers = lambda path: "image" in path
        direct.put("image.jpg", CONTENT)
        assert store.get("image.jpg") == CONTENT
        etag = direct.put("image.jpg", CONTENT[::-1])
        proxy.rules.append(Rule("stale", "GET"))
        assert store.get("image.jpg", if_match=etag) == CONTENT[::-1]
        assert calls.answered == 1

    def test_what_stays_wrong_is_told_in_boto3s_words(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        etag = direct.put("image.jpg", CONTENT)
        proxy.rules.append(Rule("answer", "GET", times=None, status=403, code="AccessDenied"))
        with pytest.raises(AccessDenied, match="their policy forbids"):
            store.get("image.jpg", if_match=etag)
        proxy.rules[:] = [Rule("ignore_range", "GET", times=None)]
        with pytest.raises(StorageError, match="ignores ranges"):
            store.get_range("image.jpg", 10, 10, if_match=etag)

    def test_boto3_reads_alone_for_a_minute_after_three_failures(
        self,
        store: ObjectStore,
        direct: ObjectStore,
        proxy: FaultyProxy,
        calls: Calls,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        now = 1000.0
        monkeypatch.setattr(quick_reads.time, "monotonic", lambda: now)
        etag = direct.put("image.jpg", CONTENT)
        for missing in ("a", "b", "c", "d"):  # boto3 does not get these either
            with pytest.raises(ObjectNotFound):
                store.get(missing, if_match=etag)
        calls.sent = 0
        for _ in range(5):
            proxy.rules[:] = [Rule("answer", "GET")]
            assert store.get("image.jpg", if_match=etag) == CONTENT
        assert calls.sent == 3
        proxy.rules.clear()
        now += 61
        assert store.get("image.jpg", if_match=etag) == CONTENT
        assert (calls.sent, calls.answered) == (4, 1)

    def test_a_server_that_is_down_is_not_asked_twice_for_long(
        self, bucket: str, proxy: FaultyProxy, direct: ObjectStore, calls: Calls
    ) -> None:
        options = StorageOptions(endpoint_url=proxy.endpoint_url, attempts=1)
        store = open_store(f"s3://{bucket}/run", options)
        know_the_way(store)
        etag = direct.put("image.jpg", CONTENT)
        proxy.requests.clear()
        proxy.rules.append(Rule("answer", "GET", times=None, status=503, code="SlowDown"))
        for _ in range(6):
            with pytest.raises(StorageUnavailable):
                store.get("image.jpg", if_match=etag)
        assert (calls.sent, len(proxy.requests)) == (3, 9)

    def test_a_panic_of_rust_leaves_all_reads_to_boto3(
        self, store: ObjectStore, direct: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where no thread can be started."""
        panics = 0

        class PanicException(BaseException):  # pyo3's name
            pass

        def panic(*_: Any, **__: Any) -> None:
            nonlocal panics
            panics += 1
            raise PanicException("OS can't spawn worker thread")

        monkeypatch.setattr(obstore, "get", panic)
        etag = direct.put("image.jpg", CONTENT)
        for _ in range(3):
            assert store.get("image.jpg", if_match=etag) == CONTENT
        assert panics == 1

    def test_a_large_object_is_read_in_pieces(
        self, store: ObjectStore, direct: ObjectStore, calls: Calls, tmp_path: Path
    ) -> None:
        large = tmp_path / "large"
        with large.open("wb") as file:
            file.truncate(MOST_BYTES + 1)
        etag = direct.put("large.tif", large)
        assert store.get_range("large.tif", MOST_BYTES, 1, if_match=etag) == b"\0"
        assert len(store.get_range("large.tif", 0, MOST_BYTES + 1, if_match=etag)) == MOST_BYTES + 1
        assert calls.sent == 1
        for _ in range(5):  # after three of them they are no longer begun by obstore
            assert len(store.get("large.tif", if_match=etag)) == MOST_BYTES + 1
        assert calls.sent == 4

    def test_keys_that_obstore_would_tidy_up_are_read_by_boto3(self, calls: Calls) -> None:
        reads = QuickReads("b", _Client(), None, None, StorageOptions())
        for key in ("a//b", "/a", "a/", "a/./b", "a/../b", "..", "a\nb", "\x7f"):
            assert quick_reads._ODD_KEY.search(key), key
            assert reads.read(key, quick_reads.Span(etag="1"), lambda: b"boto3's") == b"boto3's"
        for key in (*AWKWARD_KEYS, "a.b/c", ".a/b", "a./b", "..a", "a..b/c"):
            assert not quick_reads._ODD_KEY.search(key), key


@pytest.mark.slow
class TestWhoReads:
    def test_a_forked_process_reads_by_boto3(self, store: ObjectStore, direct: ObjectStore) -> None:
        etag = direct.put("image.jpg", CONTENT)
        assert store.get("image.jpg", if_match=etag) == CONTENT
        child = os.fork()
        if child == 0:  # a hang would end with the test's own time limit
            same = all(store.get("image.jpg", if_match=etag) == CONTENT for _ in range(3))
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_new_credentials_are_taken(
        self, weed_s3: S3Server, calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A process that hands out keys for a while, as for a role; boto3 asks it again."""
        issued = tmp_path / "issued"
        program = tmp_path / "keys.sh"
        program.write_text(
            f"#!/bin/sh\necho x >> {issued}\n"
            'printf \'{"Version": 1, "AccessKeyId": "%s", "SecretAccessKey": "%s", '
            f'"Expiration": "%s"}}\' {weed_s3.access_key} {weed_s3.secret_key} '
            "$(date -u -d '+12 minutes' +%Y-%m-%dT%H:%M:%SZ)\n"
        )
        program.chmod(0o700)
        config = tmp_path / "config"
        config.write_text(f"[default]\ncredential_process = {program}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        bucket = weed_s3.fresh_bucket()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        # Always about to end, so obstore asks each time; boto3 renews when 15 minutes are left.
        monkeypatch.setattr(quick_reads, "_CREDENTIALS_FOR", datetime.timedelta(minutes=1))
        store = open_store(f"s3://{bucket}", weed_s3.options)
        know_the_way(store)
        etag = store.put("image.jpg", CONTENT)
        before = len(issued.read_text())
        for _ in range(3):
            assert store.get("image.jpg", if_match=etag) == CONTENT
        assert calls.answered == 3
        assert len(issued.read_text()) > before

    def test_a_private_authority_is_trusted_as_boto3_trusts_it(
        self,
        proxy: FaultyProxy,
        bucket: str,
        calls: Calls,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        bundle, served = certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(served)
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
        options = StorageOptions(
            endpoint_url=proxy.endpoint_url.replace("http:", "https:"), attempts=2
        )
        with pytest.raises(LabelfleetError, match="encrypted connection failed"):
            open_store(f"s3://{bucket}", options).head("key")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        store = open_store(f"s3://{bucket}", options)
        know_the_way(store)
        etag = store.put("image.jpg", CONTENT)
        assert store.get("image.jpg", if_match=etag) == CONTENT
        assert calls.answered == 1

    def test_the_main_thread_reads_by_boto3_which_a_signal_interrupts(
        self, store: ObjectStore, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(quick_reads, "in_main_thread", IN_MAIN_THREAD)
        know_the_way(store)
        assert calls.sent == 0
        with ThreadPoolExecutor(1) as pool:
            pool.submit(know_the_way, store).result()
        assert calls.sent == 1

    def test_a_slow_renewal_holds_up_no_other_reader(
        self, store: ObjectStore, direct: ObjectStore, calls: Calls
    ) -> None:
        etag = direct.put("image.jpg", CONTENT)
        reads: QuickReads = store._quick  # type: ignore[attr-defined]
        real, waits, go_on = reads._credentials, threading.Event(), threading.Event()

        class Renewing:
            first = True

            def get_frozen_credentials(self) -> Any:
                if Renewing.first:
                    Renewing.first = False
                    waits.set()
                    go_on.wait(30)
                return real.get_frozen_credentials()

        reads._credentials = Renewing()  # type: ignore[assignment]
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(store.get, "image.jpg", if_match=etag)
            assert waits.wait(30)
            assert pool.submit(store.get, "image.jpg", if_match=etag).result(20) == CONTENT
            assert not slow.done()
            go_on.set()
            assert slow.result(20) == CONTENT
        assert calls.answered == 2

    def test_no_session_token_goes_over_plain_http(
        self, bucket: str, moto_s3: S3Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """obstore follows a redirect to another host, and takes the token there."""
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
        read_twice(moto_s3, bucket)
        assert calls.sent == 0

    @pytest.mark.parametrize(
        "variables",
        [
            {"NO_PROXY": "{host}"},
            {"NO_PROXY": "*"},
            {"http_proxy": ""},
            {"http_proxy": "", "ALL_PROXY": "{proxy}", "all_proxy": ""},
        ],
    )
    def test_a_proxy_that_boto3_goes_round_is_gone_round(
        self,
        bucket: str,
        moto_s3: S3Server,
        calls: Calls,
        monkeypatch: pytest.MonkeyPatch,
        variables: dict[str, str],
    ) -> None:
        for name in ("no_proxy", "NO_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        with faulty_proxy(moto_s3.endpoint_url) as other:
            host = moto_s3.endpoint_url.removeprefix("http://")
            monkeypatch.setenv("HTTP_PROXY", other.endpoint_url)
            for name, value in variables.items():
                monkeypatch.setenv(name, value.format(host=host, proxy=other.endpoint_url))
            read_twice(moto_s3, bucket)
            assert other.requests == []
        assert (calls.sent, calls.answered) == (1, 1)

    def test_a_customers_key_in_the_environment_is_not_sent(
        self, bucket: str, moto_s3: S3Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY_BASE64", "a2V5")
        read_twice(moto_s3, bucket)
        assert calls.sent == 0

    def test_a_proxy_is_left_to_boto3(
        self, bucket: str, moto_s3: S3Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(quick_reads, "get_environ_proxies", lambda url: {"http": "http://p"})
        read_twice(moto_s3, bucket)
        assert calls.sent == 0

    def test_the_environment_does_not_send_reads_elsewhere(
        self, bucket: str, moto_s3: S3Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """obstore reads variables that boto3 does not know."""
        for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
        monkeypatch.setenv("AWS_BUCKET", "another")
        read_twice(moto_s3, bucket)
        assert (calls.sent, calls.answered) == (1, 1)

    def test_without_obstore_boto3_reads_everything(
        self, bucket: str, moto_s3: S3Server, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(quick_reads, "obstore", None)
        read_twice(moto_s3, bucket)
        assert calls.sent == 0


class _Client:
    class meta:  # noqa: N801  # as boto3's client has it
        class events:  # noqa: N801
            register = staticmethod(lambda *_: None)


def certificate(folder: Path) -> tuple[Path, Path]:
    """Write an authority, and its certificate for 127.0.0.1 with its key; returns both files."""
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)

    def signed(name: str, issuer: str, key: Any, by: Any, *extensions: Any) -> x509.Certificate:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

        builder = x509.CertificateBuilder(
            issuer_name=named(issuer), subject_name=named(name), public_key=key.public_key(),
            serial_number=x509.random_serial_number(), not_valid_before=now - day,
            not_valid_after=now + day,
        )  # fmt: skip
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        return builder.sign(by, hashes.SHA256())

    root, host = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = signed("tests", "tests", root, root, x509.BasicConstraints(ca=True, path_length=0))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = signed("127.0.0.1", "tests", host, root, names)
    pem = serialization.Encoding.PEM
    bundle, served = folder / "authority.pem", folder / "served.pem"
    bundle.write_bytes(authority.public_bytes(pem))
    served.write_bytes(
        leaf.public_bytes(pem)
        + host.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return bundle, served

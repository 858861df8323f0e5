"""S3 when things go wrong: lost replies, broken bodies, errors, credentials; through a proxy."""

from __future__ import annotations

import os
import tracemalloc
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.utils import parse_timestamp

from storage.errors import (
    AccessDenied,
    AlreadyExists,
    BucketNotFound,
    ConfigError,
    LabelfleetError,
    NotAtomic,
    ObjectChanged,
    ShortRead,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.s3 import store as store_module
from storage.s3.client import make_client, parse_time
from storage.stores.open import open_object, open_store
from tests.support.poured import Poured
from tests.support.servers.proxy import FaultyProxy, Rule
from tests.support.servers.s3 import SECRET_KEY, S3Server

pytestmark = pytest.mark.slow

MIB = 1 << 20
CONTENT = b"".join(i.to_bytes(4, "big") for i in range(MIB))  # 4 MiB, no two words alike


@pytest.fixture
def options(proxy: FaultyProxy) -> StorageOptions:
    return StorageOptions(endpoint_url=proxy.endpoint_url, attempts=3, read_timeout_s=20)


@pytest.fixture
def store(bucket: str, options: StorageOptions) -> ObjectStore:
    """The same objects as ``direct``, through the proxy."""
    return open_store(f"s3://{bucket}/run", options)


class TestLostReplies:
    @pytest.mark.slow
    def test_a_creator_finds_its_own_object(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        proxy.rules.append(Rule("drop_reply", "PUT"))
        with pytest.raises(AlreadyExists):
            store.create("part", b"attempt 7")
        assert direct.get("part") == b"attempt 7"

    @pytest.mark.slow
    def test_a_put_is_sent_again(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy, tmp_path: Path
    ) -> None:
        spool = tmp_path / "spool"
        spool.write_bytes(CONTENT)
        proxy.rules.append(Rule("drop_reply", "PUT", times=2))
        store.put("part", spool)
        assert direct.get("part") == CONTENT

    def test_a_server_that_never_replies_is_unavailable(
        self, bucket: str, options: StorageOptions, proxy: FaultyProxy
    ) -> None:
        impatient = open_store(f"s3://{bucket}", replace(options, attempts=2, read_timeout_s=0.3))
        proxy.rules.append(Rule("hang", "PUT", times=None))
        with pytest.raises(StorageUnavailable, match=proxy.endpoint_url):
            impatient.create("part", b"1")

    def test_one_timeout_is_nothing(
        self, bucket: str, options: StorageOptions, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        direct.put("part", b"1")
        impatient = open_store(f"s3://{bucket}/run", replace(options, read_timeout_s=0.5))
        proxy.rules.append(Rule("hang", "GET"))
        assert impatient.get("part") == b"1"


class TestLargeBodies:
    """Those that do not go in one PutObject, here above 6 MiB."""

    SIZE = 12 * MIB + 7

    @pytest.fixture
    def spool(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setattr(store_module, "_ONE_PUT_BYTES", 6 * MIB)
        parts = TransferConfig(multipart_threshold=1, multipart_chunksize=5 * MIB)
        monkeypatch.setattr(store_module, "_PARTS", parts)
        spool = tmp_path / "spool"
        spool.write_bytes((CONTENT * 4)[: self.SIZE])
        return spool

    def sent(self, proxy: FaultyProxy) -> list[str]:
        return [f"{method} {'?' in path}" for method, path, _ in proxy.requests]

    def test_they_are_created_in_parts_where_nothing_is(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy, spool: Path
    ) -> None:
        etag = store.create("large", Poured([spool.read_bytes()]))
        assert self.sent(proxy).count("PUT True") == 3
        assert direct.get("large", if_match=etag) == spool.read_bytes()
        proxy.requests.clear()
        with pytest.raises(AlreadyExists, match="large"):
            store.create("large", Poured([spool.read_bytes(), b"late"]))
        assert self.sent(proxy) == ["HEAD False"]
        assert direct.head("large").etag == etag
        assert store.put("large", Poured([spool.read_bytes(), b"late"])) != etag
        assert direct.head("large").nbytes == self.SIZE + 4

    def test_a_condition_is_never_dropped(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy, spool: Path
    ) -> None:
        direct.put("large", b"theirs")
        with pytest.raises(ObjectChanged):
            store.replace("large", spool, if_match="0" * 32)
        with pytest.raises(AlreadyExists):
            store.create("large", spool)
        assert direct.get("large") == b"theirs"
        store.create("commit", spool)  # one request decides who creates what may not be replaced
        assert "PUT True" not in self.sent(proxy)

    def test_a_lost_reply_is_asked_for_again(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy, spool: Path
    ) -> None:
        proxy.rules.append(Rule("drop_reply", "PUT", times=2))
        store.put("large", spool)
        assert direct.get("large") == spool.read_bytes()

    def test_a_broken_upload_leaves_neither_object_nor_parts(
        self, bucket: str, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy, spool: Path
    ) -> None:
        proxy.rules.append(Rule("answer", "PUT", times=None, after=2, status=507, code="Full"))
        with pytest.raises(StorageFull, match="large"):
            store.put("large", spool)
        proxy.rules.clear()
        assert [found.key for found in direct.list()] == []
        client, _ = make_client(StorageOptions(endpoint_url=proxy.endpoint_url))
        assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


class TestBrokenBodies:
    def test_a_stream_goes_on_where_it_broke(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        etag = direct.put("shard", CONTENT)
        proxy.rules += [
            Rule("cut", "GET", keep_bytes=MIB + 123),
            Rule("cut", "GET", keep_bytes=77),
            Rule("cut", "GET", keep_bytes=0),
        ]
        with store.stream("shard", if_match=etag) as source:
            assert source.read() == CONTENT
        ranges = [r for method, _, r in proxy.requests if method == "GET"]
        assert ranges[0] == ""
        assert ranges[-1] == f"bytes={MIB + 200}-{len(CONTENT) - 1}"

    def test_get_and_get_range_go_on_too(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        direct.put("shard", CONTENT)
        proxy.rules.append(Rule("cut", "GET", keep_bytes=1000))
        assert store.get("shard") == CONTENT
        proxy.rules[:] = [Rule("cut", "GET", keep_bytes=1000)]
        assert store.get_range("shard", MIB, MIB) == CONTENT[MIB : 2 * MIB]

    def test_what_never_arrives_whole_is_a_short_read(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        direct.put("shard", CONTENT)
        proxy.rules += [
            Rule("cut", "GET", keep_bytes=5000),
            Rule("cut", "GET", times=None, keep_bytes=0),
        ]
        with store.stream("shard") as source:
            assert source.read(100) == CONTENT[:100]
            with pytest.raises(ShortRead, match="shard"):
                source.read()
            with pytest.raises(ShortRead):  # not an end of file when asked again
                source.read()
        with pytest.raises(ShortRead):
            store.get("shard")

    def test_an_object_that_changed_meanwhile_is_not_spliced(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        direct.put("shard", CONTENT)
        proxy.rules += [
            Rule("cut", "GET", keep_bytes=MIB),
            Rule("then", "GET", action=lambda: direct.put("shard", CONTENT[::-1])),
        ]
        with pytest.raises(ObjectChanged), store.stream("shard") as source:
            source.read()

    def test_a_server_without_ranges_is_found_out(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        direct.put("shard", CONTENT)
        proxy.rules.append(Rule("ignore_range", "GET", times=None))
        with pytest.raises(StorageError, match="ignores ranges"):
            store.get_range("shard", 10, 10)


class TestErrorAnswers:
    @pytest.mark.slow
    def test_slow_down_is_waited_out(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        proxy.rules += [
            Rule("answer", "PUT", times=2, status=503, code="SlowDown"),
            Rule("answer", "GET", times=2, status=500, code="InternalError"),
        ]
        store.create("part", b"1")
        assert store.get("part") == b"1"
        assert len(proxy.requests) == 6

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("status", "code", "error"),
        [
            (503, "SlowDown", StorageUnavailable),
            (500, "InternalError", StorageUnavailable),
            (504, "", StorageUnavailable),
            (507, "InsufficientStorage", StorageFull),
            (403, "QuotaExceeded", StorageFull),
            (403, "AccessDenied", AccessDenied),
            (400, "ExpiredToken", AccessDenied),
            (403, "RequestTimeTooSkewed", AccessDenied),
            (404, "NoSuchBucket", BucketNotFound),
            (400, "EntityTooLarge", StorageError),
            (400, "SomethingNew", StorageError),
        ],
    )
    def test_every_answer_has_its_error(
        self,
        bucket: str,
        options: StorageOptions,
        proxy: FaultyProxy,
        status: int,
        code: str,
        error: type[LabelfleetError],
    ) -> None:
        store = open_store(f"s3://{bucket}/run", replace(options, attempts=1))
        proxy.rules.append(Rule("answer", "PUT", times=None, status=status, code=code))
        with pytest.raises(error) as caught:
            store.create("part", b"1")
        assert type(caught.value) is error
        assert bucket in caught.value.message

    def test_colliding_conditional_puts_are_sent_again(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        conflict = Rule("answer", "PUT", status=409, code="ConditionalRequestConflict", times=2)
        proxy.rules.append(conflict)
        store.create("part", b"1")
        assert direct.get("part") == b"1"
        conflict.hits, conflict.times = 0, None
        with pytest.raises(StorageUnavailable, match="colliding"):
            store.create("other", b"1")

    def test_access_lost_in_the_middle_of_a_listing(
        self, store: ObjectStore, proxy: FaultyProxy
    ) -> None:
        store.put("key", b"1")
        proxy.rules.append(
            Rule("answer", "GET", after=1, times=None, status=403, code="AccessDenied")
        )
        assert [o.key for o in store.list()] == ["key"]
        with pytest.raises(AccessDenied):
            list(store.list())

    def test_a_server_that_ignores_conditions_cannot_hold_a_run(
        self, store: ObjectStore, direct: ObjectStore, proxy: FaultyProxy
    ) -> None:
        proxy.rules.append(Rule("ignore_condition", "PUT", times=None))
        with pytest.raises(NotAtomic, match="atomically"):
            check_output(store)
        assert list(direct.list()) == []


class TestWhoMayDoWhat:
    @pytest.mark.slow
    def test_wrong_keys(self, weed_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        bucket = weed_s3.fresh_bucket()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-of-anybody")
        self._denied(weed_s3, bucket, "AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-known")
        self._denied(weed_s3, bucket, "AWS_ACCESS_KEY_ID")

    def _denied(self, server: S3Server, bucket: str, hint: str) -> None:
        store = open_store(f"s3://{bucket}", server.options)
        for verb in (lambda: list(store.list()), lambda: store.create("key", b"1")):
            with pytest.raises(AccessDenied) as caught:
                verb()
            assert hint in str(caught.value)
            for secret in (SECRET_KEY, "not-the-secret-of-anybody"):
                assert secret not in str(caught.value)
        with pytest.raises(AccessDenied):
            store.head("key")

    def test_no_keys(self, moto_s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
            list(open_store(f"s3://{bucket}", moto_s3.options).list())

    def test_no_such_profile(
        self, moto_s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(AccessDenied, match="AWS_PROFILE"):
            list(open_store(f"s3://{bucket}", moto_s3.options).list())


class TestWhereItIs:
    @pytest.mark.slow
    @pytest.mark.parametrize("verb", ["list", "get", "create", "put", "check_output"])
    def test_no_such_bucket(self, moto_s3: S3Server, verb: str) -> None:
        store = open_store("s3://no-such-bucket/run", moto_s3.options)
        with pytest.raises(BucketNotFound, match="no-such-bucket"):
            {
                "list": lambda: list(store.list()),
                "get": lambda: store.get("key"),
                "create": lambda: store.create("key", b"1"),
                "put": lambda: store.put("key", b"1"),
                "check_output": lambda: check_output(store),
            }[verb]()

    def test_a_server_that_does_not_listen(self, s3_credentials: None) -> None:
        options = StorageOptions(endpoint_url="http://127.0.0.1:9", attempts=2)
        with pytest.raises(StorageUnavailable, match=r"127\.0\.0\.1:9"):
            open_store("s3://bucket", options).head("key")

    def test_https_to_an_http_port(self, moto_s3: S3Server) -> None:
        secure = moto_s3.endpoint_url.replace("http://", "https://")
        options = StorageOptions(endpoint_url=secure, attempts=1)
        with pytest.raises(StorageUnavailable, match="http://"):
            open_store("s3://bucket", options).head("key")

    @pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "not an endpoint", "http://"])
    def test_an_invalid_endpoint(self, s3_credentials: None, endpoint: str) -> None:
        with pytest.raises(ConfigError, match="http://127"):
            open_store("s3://bucket", StorageOptions(endpoint_url=endpoint)).head("key")

    @pytest.mark.slow
    @pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    def test_the_endpoint_may_come_from_the_environment(
        self, moto_s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        monkeypatch.setenv(variable, moto_s3.endpoint_url)
        store, key = open_object(f"s3://{bucket}/models/cells.pth")
        store.put(key, b"weights")
        assert [o.key for o in open_store(f"s3://{bucket}").list()] == ["models/cells.pth"]

    def test_a_password_in_the_endpoint_is_not_shown(self, s3_credentials: None) -> None:
        options = StorageOptions(endpoint_url="http://me:hunter2@127.0.0.1:9", attempts=1)
        with pytest.raises(LabelfleetError) as caught:
            open_store("s3://bucket", options).head("key")
        assert "hunter2" not in str(caught.value)


class TestPresign:
    def test_anyone_can_open_it(self, direct: ObjectStore) -> None:
        direct.put("folder/an image.jpg", b"pixels")
        with urllib.request.urlopen(direct.presign("folder/an image.jpg", expires_s=60)) as reply:
            assert reply.read() == b"pixels"

    @pytest.mark.slow
    def test_a_server_with_credentials_takes_it_until_it_expires(self, weed_s3: S3Server) -> None:
        store = weed_s3.fresh_store()
        store.put("key", b"pixels")
        url = store.presign("key", expires_s=60)
        with urllib.request.urlopen(url) as reply:
            assert reply.read() == b"pixels"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url.replace("X-Amz-Signature=", "X-Amz-Signature=0"))


class TestMemory:
    """Peak of Python's own allocations while 64 MiB pass through."""

    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        path = tmp_path / "large"
        path.write_bytes(os.urandom(MIB) * 64)
        return path

    @pytest.mark.slow
    def test_reading_and_writing_hold_a_piece(
        self, moto_s3: S3Server, direct: ObjectStore, large: Path
    ) -> None:
        direct.put("warm-up", b"1")
        tracemalloc.start()
        try:
            direct.put("large", large)
            with direct.stream("large") as source:
                total = 0
                while piece := source.read(MIB):
                    total += len(piece)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert total == 64 * MIB
        assert peak < 10 * MIB


@pytest.mark.parametrize(
    "written",
    [
        "2026-11-25T23:42:06.000Z",
        "2026-11-25T23:42:06Z",
        "2026-11-25T23:42:06.123456Z",
        "Wed, 25 Nov 2026 23:42:06 GMT",
        "2026-11-25T23:42:06+02:00",
        1795650126,
        "1795650126.5",
        "20261125T234206Z",
    ],
)
def test_times_are_read_as_botocore_reads_them(written: object) -> None:
    assert parse_time(written) == parse_timestamp(written)

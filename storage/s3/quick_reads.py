"""Small reads of a known version through obstore: the requests that an S3Store sends most.

boto3 spends milliseconds of Python on a request, and holds the interpreter lock meanwhile; obstore
does the same in Rust (``benchmarks.s3_reads``). It is used for a read's first try alone:
whatever comes back other than exactly these bytes of exactly that version, boto3 asks again, and
its answer counts. So credentials, retries and errors in words stay boto3's.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

from botocore.credentials import Credentials
from botocore.utils import get_environ_proxies

from storage.errors import StorageUnavailable
from storage.objects.native_threads import in_main_thread, obstore_works_here
from storage.objects.protocols import StorageOptions
from storage.s3.resuming import Span

try:
    import obstore
    from obstore.store import S3Store as Obstore
except ImportError:  # it comes with labelling; without it boto3 reads everything
    obstore = None  # type: ignore[assignment]

log = logging.getLogger("labelfleet")

# Larger objects are read by boto3, in pieces, resumed where a connection broke.
MOST_BYTES: Final = 16 << 20
# obstore asks again when five minutes are left; boto3 renews ten minutes before the end.
_CREDENTIALS_FOR = timedelta(minutes=10)
_FAILURES, _REST_S = 3, 60.0
_SIGNATURE = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^ ]+/\d{8}/([a-z0-9-]+)/s3/aws4_request, ?"
    r"SignedHeaders=([a-z0-9;-]+),"
)
# What a plain GetObject signs; one more header would have to be repeated.
_PLAIN = frozenset(
    {
        "host",
        "if-match",
        "range",
        "x-amz-checksum-mode",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-security-token",
    }
)
# obstore tidies such keys up, or refuses them.
_ODD_KEY = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Way:
    """How boto3 reached a bucket, taken from a request that succeeded.

    Attributes:
        endpoint: scheme, host and port.
        virtual_host: the host names the bucket.
        region: the one that it signed for.
    """

    endpoint: str
    virtual_host: bool
    region: str

    @classmethod
    def of(cls, url: str, headers: Mapping[str, Any], bucket: str, key: str) -> Way | None:
        """Return the way of a signed GetObject; None: not one that obstore could go too."""
        parts = urlsplit(url)
        signed = headers.get("Authorization", b"")
        found = _SIGNATURE.match(signed.decode("latin-1") if isinstance(signed, bytes) else signed)
        if not found or parts.query or not _PLAIN.issuperset(found[2].split(";")):
            return None
        path, endpoint = unquote(parts.path), f"{parts.scheme}://{parts.netloc}"
        if path == f"/{bucket}/{key}":
            return cls(endpoint, False, found[1])
        if path == f"/{key}" and parts.netloc.startswith(f"{bucket}."):
            return cls(endpoint, True, found[1])
        return None


class QuickReads:
    """Reads of small objects of one bucket, for the boto3 client whose requests it watches.

    The first read is boto3's and shows the way. Where obstore fails three times in a row, and not
    for the object's own sake, boto3 reads alone for a minute. It reads alone altogether

    - without obstore, or where obstore's threads cannot be started, and in a forked process;
    - in the main thread, since obstore does not look for signals while it waits;
    - through a proxy, and with a session token over plain http, which obstore would send along
      to wherever it is redirected;
    - where requests carry more than a plain read needs (a requester who pays, a customer's key,
      S3 Express, signatures for many regions).

    Not checked here, where boto3 would: the checksum that AWS keeps of a whole object; on the way
    from there TLS protects the bytes. The usual authorities are trusted besides ``ca_bundle``.

    Args:
        bucket: its name.
        client: the boto3 client.
        credentials: boto3's; None: it has none.
        ca_bundle: file of the authorities to trust besides the usual ones, as boto3 found it.
        options: timeouts.
    """

    def __init__(
        self,
        bucket: str,
        client: Any,
        credentials: Credentials | None,
        ca_bundle: str | None,
        options: StorageOptions,
    ) -> None:
        self._bucket, self._credentials = bucket, cast(Credentials, credentials)
        self._ca_bundle, self._options = ca_bundle, options
        self._lock = threading.Lock()
        self._sent = threading.local()
        self._store: Any = None
        self._failures, self._rest_until = 0, 0.0
        self._frozen: Any = None
        self._possible = bool(obstore and credentials) and not _customer_key()
        if self._possible:
            client.meta.events.register("before-send.s3.GetObject", self._note)

    def read(self, key: str, span: Span, otherwise: Callable[[], bytes]) -> bytes:
        """Return the bytes of a span of known version and, unless it is the whole object, known
        end.

        Args:
            key: the whole key.
            span: which bytes of which version.
            otherwise: reads them through boto3, with its errors.
        """
        if not self._possible or _ODD_KEY.search(key) or in_main_thread():
            return otherwise()
        if self._store is None:
            body = otherwise()
            self._learn(key)
            return body
        if time.monotonic() < self._rest_until:
            return otherwise()
        found = self._asked(key, span)
        if found is not None:
            self._failures = 0
            return found
        try:
            body = otherwise()
        except StorageUnavailable:  # one request fewer for a server that is overloaded or down
            self._failed()
            raise
        self._failed()
        return body

    def _asked(self, key: str, span: Span) -> bytes | None:
        try:
            # Here, so that a thread that has to renew them holds up no other.
            self._frozen = self._credentials.get_frozen_credentials()
            return self._answer(key, span)
        except Exception as exc:  # noqa: BLE001  # the border to obstore; boto3 says what is wrong
            # By its kind alone: its text may hold a signed URL.
            log.debug("s3://%s: obstore failed (%s)", self._bucket, type(exc).__name__)
            return None
        except BaseException as exc:  # noqa: BLE001  # a panic of Rust is none of the above
            self._give_up_on(exc)
            return None

    def _answer(self, key: str, span: Span) -> bytes | None:
        wanted: Any = {"if_match": f'"{span.etag}"'}
        if span.end is not None:
            wanted["range"] = (span.start, span.end)
        reply = obstore.get(self._store, key, options=wanted)
        start, end = reply.range
        if (reply.meta["e_tag"] or "").strip('"') != span.etag or end - start > MOST_BYTES:
            return None
        if span.end is not None and (start, end) != (span.start, span.end):
            return None
        body = bytes(reply.bytes())
        return body if len(body) == end - start else None

    def _give_up_on(self, exc: BaseException) -> None:
        """Read by boto3 from now on where Rust panicked (no thread could be started, for example);
        its exception is no Exception, and can be told by its name alone."""
        if type(exc).__name__ != "PanicException":
            raise exc
        self._give_up(exc)

    def _give_up(self, exc: BaseException) -> None:
        log.info("s3://%s is read by boto3: obstore cannot (%s)", self._bucket, type(exc).__name__)
        self._possible = False

    def _failed(self) -> None:
        self._failures += 1
        if self._failures >= _FAILURES:
            log.info("s3://%s: boto3 reads alone for %d s", self._bucket, _REST_S)
            self._failures, self._rest_until = 0, time.monotonic() + _REST_S

    def _note(self, request: Any, **_: Any) -> None:
        self._sent.request = request.url, request.headers

    def _learn(self, key: str) -> None:
        with self._lock:
            sent = getattr(self._sent, "request", None)
            if self._store is not None or not self._possible or sent is None:
                return
            url, headers = sent
            way = Way.of(url, headers, self._bucket, key)
            if way is None or get_environ_proxies(url) or not obstore_works_here():
                self._possible = False
                return
            if urlsplit(url).scheme != "https" and "x-amz-security-token" in headers:
                self._possible = False
                return
            try:
                self._store = self._opened(way)
            except Exception as exc:  # noqa: BLE001  # the border to obstore; or an unreadable bundle
                self._give_up(exc)
            except BaseException as exc:  # noqa: BLE001  # a panic of Rust is none of the above
                self._give_up_on(exc)

    def _opened(self, way: Way) -> Any:
        settings: Any = {
            "connect_timeout": timedelta(seconds=self._options.connect_timeout_s),
            "read_timeout": timedelta(seconds=self._options.read_timeout_s),
            "timeout": timedelta(minutes=10),  # a whole reply; read_timeout notices a standstill
            "allow_http": way.endpoint.startswith("http://"),
            # A proxy for nothing: otherwise obstore looks for one in the environment, by rules that
            # are not boto3's.
            "proxy_url": "http://127.0.0.1:9",
            "proxy_excludes": "*,0.0.0.0/0,::/0",
        }
        if self._ca_bundle:
            settings["root_certificate"] = Path(self._ca_bundle).read_bytes()
        # All of these can come from the environment, where boto3 does not look for them.
        config: Any = {
            "endpoint": way.endpoint,
            "aws_endpoint_url_s3": way.endpoint,
            "virtual_hosted_style_request": way.virtual_host,
            "region": way.region,
            "skip_signature": False,
            "request_payer": False,
            "s3_express": False,
        }
        return Obstore(
            self._bucket,
            config=config,
            client_options=settings,
            retry_config={"max_retries": 0, "retry_timeout": timedelta(minutes=10)},
            credential_provider=self._kept,
        )

    def _kept(self) -> Any:
        return {
            "access_key_id": self._frozen.access_key,
            "secret_access_key": self._frozen.secret_key,
            "token": self._frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_FOR,
        }


def _customer_key() -> bool:
    """Return whether the environment names encryption that obstore would ask for, and boto3 not."""
    return any(n.startswith(("AWS_SSE_", "AWS_SERVER_SIDE_ENCRYPTION")) for n in os.environ)

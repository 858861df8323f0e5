"""EC2's instance metadata service as far as spot notices go, served for real on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataServer(ThreadingHTTPServer):
    """Answers as IMDSv2 does: nothing without a token, 404 until there is a notice.

    Attributes:
        notice: the body of spot/instance-action; empty: there is none.
        valid: how many answers a token is good for.
        asked: status of every answer so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.notice = ""
        self.valid = 10**9
        self.tokens: dict[str, int] = {}
        self.asked: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_PUT(self) -> None:
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not seconds.isdigit() or int(seconds) > 21_600:
            self._say(400, "")
            return
        token = f"token-{len(self.server.tokens)}"
        self.server.tokens[token] = self.server.valid
        self._say(200, token)

    def do_GET(self) -> None:
        token = self.headers.get("X-aws-ec2-metadata-token", "")
        left = self.server.tokens.get(token, 0)
        if left <= 0:
            self._say(401, "")
            return
        self.server.tokens[token] = left - 1
        there = self.path == "/latest/meta-data/spot/instance-action" and self.server.notice
        self._say(200 if there else 404, self.server.notice)

    def _say(self, status: int, body: str) -> None:
        self.server.asked.append((self.command, status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """A running one."""
    server = MetadataServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

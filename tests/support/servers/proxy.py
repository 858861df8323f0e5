"""An HTTP proxy in front of a real server that drops replies, cuts bodies, hangs, answers 5xx."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Effect = Literal[
    "drop_reply", "cut", "answer", "hang", "ignore_range", "ignore_condition", "then",
    "close", "late", "delay", "answer_after", "reset", "stale",
]  # fmt: skip


@dataclass
class Rule:
    """What happens to the next requests of one method whose path holds ``path_part``.

    Attributes:
        effect: ``drop_reply``: the server does the work, the client hears nothing; ``cut``:
            the body ends after ``keep_bytes``; ``answer``: ``status`` and ``code`` come from the
            proxy, the server sees nothing; ``hang``: nothing comes until the proxy closes;
            ``ignore_range``, ``ignore_condition``: Range, or If-None-Match, does not reach the
            server; ``then``: only ``action``; ``close``: neither side hears anything; ``late``: the
            client hears nothing, and the server hears of it only ``delay_s`` later; ``delay``: all
            goes well, ``delay_s`` later; ``answer_after``: as ``answer``, once the server has done
            the work; ``reset``: as ``close``, by a TCP reset; ``stale``: the first good reply to
            this very path is given once more.
        action: runs before the request is forwarded.
        times: how many requests; None: all.
        after: how many matching requests go well first.
    """

    effect: Effect
    method: str
    times: int | None = 1
    after: int = 0
    path_part: str = ""
    keep_bytes: int = 0
    status: int = 503
    code: str = "SlowDown"
    delay_s: float = 0.0
    action: Callable[[], None] | None = None
    hits: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Return whether this request is hit; counts it."""
        if method != self.method or self.path_part not in path:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to ``upstream_url``; ``rules`` say where it does not behave.

    Attributes:
        requests: (method, path, Range header) of all that arrived.
        chaos: asked for a rule, with method and path, where none of ``rules`` takes a request.
        late: how many requests are on their way to the server without a client.
        remembered: the first good reply to each GET, while ``remembers`` says so of its path.
    """

    daemon_threads = True

    def __init__(self, upstream_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream_url).netloc
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str, str]] = []
        self.chaos: Callable[[str, str], Rule | None] | None = None
        self.late = 0
        self.remembers: Callable[[str], bool] = lambda path: False
        self.remembered: dict[str, tuple[http.client.HTTPResponse, bytes]] = {}
        self.closing = threading.Event()
        self.guard = threading.Lock()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def rule_for(self, method: str, path: str, range_header: str) -> Rule | None:
        with self.guard:
            self.requests.append((method, path, range_header))
            found = next((r for r in self.rules if r.takes(method, path)), None)
            return self.chaos(method, path) if found is None and self.chaos else found

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what these tests are about: nothing to report."""


@contextmanager
def faulty_proxy(upstream_url: str) -> Iterator[FaultyProxy]:
    """A running proxy; ends hanging requests when left."""
    proxy = FaultyProxy(upstream_url)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _handle(self) -> None:
        rule = self.server.rule_for(self.command, self.path, self.headers.get("Range", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        effect = rule.effect if rule else None
        if rule is not None and rule.action is not None:
            rule.action()
        if effect == "hang":
            self.server.closing.wait(30)
            self.close_connection = True
        elif effect == "answer" and rule is not None:
            self._answer(rule)
        elif effect == "close":
            self.close_connection = True
        elif effect == "reset":
            # Lingering for no time at all makes the kernel send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
        elif effect == "stale" and (old := self.server.remembered.get(self.path)):
            self._reply(*old, len(old[1]))
        elif effect == "late" and rule is not None:
            self._forward_late(body, rule)
        else:
            self.server.closing.wait(rule.delay_s if rule is not None else 0)
            self._forward(body, rule)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = _handle  # noqa: N815 - http.server's names

    def _answer(self, rule: Rule) -> None:
        content = f"<Error><Code>{rule.code}</Code><Message>from the proxy</Message></Error>"
        self.send_response(rule.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":  # a body there would be read as the next reply's beginning
            self.wfile.write(content.encode())

    def _forward_late(self, body: bytes, rule: Rule) -> None:
        self.close_connection = True
        drop = Rule("drop_reply", self.command)

        def forward() -> None:
            try:
                time.sleep(rule.delay_s)
                self._forward(body, drop)
            finally:
                with self.server.guard:
                    self.server.late -= 1

        with self.server.guard:
            self.server.late += 1
        threading.Thread(target=forward, daemon=True).start()

    def _forward(self, body: bytes, rule: Rule | None) -> None:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            ignored = {"ignore_range": "range", "ignore_condition": "if-none-match"}
            left_out = {"expect", "connection", ignored.get(rule.effect if rule else "", "")}
            for name, value in self.headers.items():
                if name.lower() not in left_out:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            reply = upstream.getresponse()
            content = reply.read()
        finally:
            upstream.close()
        if rule is not None and rule.effect == "drop_reply":
            self.close_connection = True
            return
        if rule is not None and rule.effect == "answer_after":
            self._answer(rule)
            return
        if self.command == "GET" and reply.status == 200 and self.server.remembers(self.path):
            self.server.remembered.setdefault(self.path, (reply, content))
        keep = rule.keep_bytes if rule is not None and rule.effect == "cut" else len(content)
        self._reply(reply, content, keep)

    def _reply(self, reply: http.client.HTTPResponse, content: bytes, keep: int) -> None:
        self.send_response_only(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = reply.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[:keep])
        self.close_connection = keep < len(content)

"""The client on a scripted server: what is repeated, what is not, and what errors say."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines.label_studio.client import LabelStudio
from pipelines.label_studio.errors import (
    OutcomeUnknown,
    RequestTooLarge,
    ReviewDenied,
    ReviewRefused,
    ReviewUnavailable,
)
from pipelines.label_studio.http import LabelStudioHttp
from pipelines.label_studio.token import Token
from storage.errors import ConfigError, ReviewError

LEGACY = "ab" * 20


def jwt(**claims: Any) -> str:
    def part(fields: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl"


class Scripted(ThreadingHTTPServer):
    """Answers with ``answers`` in turn: (status, body, headers); the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, str, dict[str, str]]] = []
        self.seen: list[tuple[str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _handle(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "")
        self.server.seen.append((self.command, self.path, token))
        answers = self.server.answers
        status, body, headers = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST = do_PATCH = do_DELETE = _handle  # noqa: N815 - http.server's names


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def client(server: Scripted, token: str = LEGACY) -> tuple[LabelStudioHttp, Clock]:
    clock = Clock()
    made = LabelStudioHttp(server.url, Token(token), sleep=clock.sleep, clock=lambda: clock.now)
    return made, clock


def script(server: Scripted, *answers: Any) -> None:
    whole = [a if isinstance(a, tuple) else (a, "{}") for a in answers]
    server.answers = [(a[0], a[1], a[2] if len(a) > 2 else {}) for a in whole]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_reading_is_repeated_until_it_works(scripted: Scripted, status: int) -> None:
    script(scripted, status, status, (200, '{"a": 1}'))
    http, _ = client(scripted)
    assert http.get("/x") == {"a": 1}
    assert len(scripted.seen) == 3


@pytest.mark.parametrize("status", [408, 500, 502, 503])
def test_an_import_is_never_repeated_when_it_may_have_been_done(
    scripted: Scripted, status: int
) -> None:
    script(scripted, status, (201, '{"task_count": 1}'))
    http, _ = client(scripted)
    with pytest.raises(OutcomeUnknown):
        LabelStudio(http).import_tasks(1, [{"data": {}}])
    assert len(scripted.seen) == 1


def test_an_import_that_was_turned_away_is_sent_again_after_the_time_asked_for(
    scripted: Scripted,
) -> None:
    script(scripted, (429, "{}", {"Retry-After": "7"}), (201, '{"task_count": 1}'))
    http, clock = client(scripted)
    LabelStudio(http).import_tasks(1, [{"data": {}}])
    assert clock.slept == [7]


def test_a_reply_that_counts_otherwise_leaves_the_outcome_open(scripted: Scripted) -> None:
    script(scripted, (201, '{"task_count": 1}'))
    http, _ = client(scripted)
    with pytest.raises(OutcomeUnknown):
        LabelStudio(http).import_tasks(1, [{"data": {}}, {"data": {}}])


def test_patience_ends(scripted: Scripted) -> None:
    script(scripted, 503)
    http, clock = client(scripted)
    with pytest.raises(ReviewUnavailable, match="does not answer"):
        http.get("/x")
    assert 60 < clock.now <= 90


def test_an_unreachable_server_is_reported_with_its_address() -> None:
    clock = Clock()
    token = Token(LEGACY)
    http = LabelStudioHttp(
        "http://127.0.0.1:9", token, sleep=clock.sleep, clock=lambda: clock.now, patience_s=1
    )
    with pytest.raises(ReviewUnavailable, match=r"127\.0\.0\.1:9"):
        http.send("POST", "/x", repeatable=False)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ((400, '{"detail": "Validation error", "validation_errors": {"title": ["short"]}}'),
         ReviewRefused, "short"),
        ((401, '{"detail": "Invalid token."}'), ReviewDenied, "Invalid token"),
        ((403, '{"detail": "no"}'), ReviewDenied, "LABEL_STUDIO_API_KEY"),
        ((401, '{"detail": "legacy token authentication has been disabled"}'), ReviewDenied,
         "personal access token"),
        ((413, "<html>nginx</html>"), RequestTooLarge, "413"),
        ((301, "", {"Location": "https://ls.example.org/"}), ReviewRefused,
         "https://ls.example.org/"),
        ((200, "<html>a login page</html>"), ReviewRefused, "something else than JSON"),
    ],
)  # fmt: skip
def test_refusals_say_what_the_server_said_and_nothing_of_its_html(
    scripted: Scripted, answer: Any, kind: type[ReviewError], said: str
) -> None:
    script(scripted, answer)
    http, _ = client(scripted)
    with pytest.raises(kind) as caught:
        http.get("/x")
    assert said in str(caught.value)
    assert "<html>" not in str(caught.value)
    assert LEGACY not in str(caught.value)
    assert len(scripted.seen) == 1


def test_a_personal_token_is_exchanged_and_renewed_once_it_has_expired(scripted: Scripted) -> None:
    personal = jwt(token_type="refresh", exp=1)
    script(
        scripted, (200, '{"access": "one"}'), (200, "{}"), (401, "{}"),
        (200, '{"access": "two"}'), (200, '{"ok": true}'),
    )  # fmt: skip
    http, _ = client(scripted, personal)
    http.get("/a")
    assert http.get("/b") == {"ok": True}
    sent = [(path, token) for _, path, token in scripted.seen]
    assert sent == [
        ("/api/token/refresh", ""), ("/a", "Bearer one"), ("/b", "Bearer one"),
        ("/api/token/refresh", ""), ("/b", "Bearer two"),
    ]  # fmt: skip


def test_an_import_survives_a_failing_exchange_and_an_expired_token_and_is_sent_once(
    scripted: Scripted,
) -> None:
    """Neither a failed exchange nor a 401 can have begun the import."""
    personal = jwt(token_type="refresh", exp=1)
    script(
        scripted, (503, "{}"), (200, '{"access": "one"}'), (401, "{}"),
        (502, "{}"), (200, '{"access": "two"}'), (201, '{"task_count": 1}'), (500, "{}"),
    )  # fmt: skip
    http, _ = client(scripted, personal)
    LabelStudio(http).import_tasks(1, [{"data": {}}])
    sent = [(path.split("?")[0], token) for _, path, token in scripted.seen]
    assert sent == [
        ("/api/token/refresh", ""), ("/api/token/refresh", ""),
        ("/api/projects/1/import", "Bearer one"), ("/api/token/refresh", ""),
        ("/api/token/refresh", ""), ("/api/projects/1/import", "Bearer two"),
    ]  # fmt: skip


def test_a_revoked_personal_token_is_said(scripted: Scripted) -> None:
    personal = jwt(token_type="refresh", exp=1)
    script(scripted, (401, '{"detail": "Token is blacklisted"}'))
    http, _ = client(scripted, personal)
    with pytest.raises(ReviewDenied, match="blacklisted") as caught:
        http.get("/a")
    assert personal not in str(caught.value)


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        (LEGACY, "legacy"),
        (f" {LEGACY}\n", "legacy"),
        (jwt(token_type="refresh"), "personal"),
        (jwt(token_type="access"), "access"),
    ],
)
def test_tokens_are_told_apart_and_hidden(secret: str, kind: str) -> None:
    token = Token(secret)
    assert token.kind == kind
    assert secret.strip() not in repr(token)


@pytest.mark.parametrize("secret", ["x", "a.b.c", "..", jwt(), "ab" * 19, "é" * 40, "AB" * 20])
def test_an_invalid_token_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Token(secret)
    assert len(secret) < 5 or secret not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"review\.url"):
        LabelStudioHttp(url, Token(LEGACY))


@pytest.mark.parametrize("status", [401, 404, 502])
def test_a_proxy_that_echoes_the_token_does_not_reveal_it(
    scripted: Scripted, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    for secret in (LEGACY, jwt(token_type="refresh", exp=1)):
        script(scripted, (status, json.dumps({"detail": f"you sent Token {secret}"})))
        http, _ = client(scripted, secret)
        with caplog.at_level("DEBUG", "labelfleet"), pytest.raises(ReviewError) as caught:
            http.get("/a")
        assert secret not in str(caught.value) + caplog.text


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    for url in ("http://me:hunter2@host:8080", "http://host:8080/?token=hunter2"):
        with pytest.raises(ConfigError) as caught:
            LabelStudioHttp(url, Token(LEGACY))
        assert "hunter2" not in str(caught.value)

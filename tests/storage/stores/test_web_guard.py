"""A list or a redirect cannot make labelfleet fetch a cloud's credentials."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from storage.errors import AccessDenied
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_object
from storage.stores.web_guard import is_metadata

METADATA = "http://169.254.169.254/latest/meta-data/iam/security-credentials/role.jpg"


@pytest.mark.parametrize(
    ("address", "refused"),
    [
        ("169.254.169.254", True),
        ("169.254.170.2", True),  # containers on AWS
        ("fe80::1%eth0", True),
        ("fd00:ec2::254", True),
        ("::ffff:169.254.169.254", True),
        ("100.100.100.200", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("2606:4700::1", False),
    ],
)
def test_which_addresses(address: str, refused: bool) -> None:
    assert is_metadata(address) is refused


class Redirects(http.server.BaseHTTPRequestHandler):
    """Sends everybody on to the metadata service."""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", METADATA)
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815  http.server calls it so

    def log_message(self, *_: object) -> None:
        """Keep test output clean."""


@pytest.fixture
def redirecting() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/photo.jpg"
        server.shutdown()


@pytest.mark.parametrize("way", ["straight", "redirect"])
def test_it_is_refused_before_a_connection_is_tried(redirecting: str, way: str) -> None:
    store, key = open_object(METADATA if way == "straight" else redirecting, StorageOptions())
    began_s = time.monotonic()
    with pytest.raises(AccessDenied, match="give out credentials"):
        store.get(key)
    assert time.monotonic() - began_s < 30  # no time-out, no retry

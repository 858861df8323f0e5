"""A real Label Studio for tests: an environment of its own, on loopback, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pipelines.label_studio.client import LabelStudio
from pipelines.label_studio.http import LabelStudioHttp
from pipelines.label_studio.token import Token
from tests.support.patience import patient
from tests.support.servers.ports import free_ports
from tests.support.servers.s3 import end_with_parent

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / ".venv-label-studio" / "bin" / "label-studio"
# The database as the first start leaves it, without a project: two minutes of migrations saved.
MIGRATED = ROOT / ".venv-label-studio" / "migrated.sqlite3"
_DATABASE = "label_studio.sqlite3"
_TOKEN, _PASSWORD = "5e" * 20, "labelfleet"  # of servers on loopback that live for a test
_READY_TIMEOUT_S = 240


@dataclass(frozen=True)
class LabelStudioServer:
    """A running server; ``folder`` is its document root for local files."""

    url: str
    folder: Path
    pid: int
    token: str = field(repr=False)
    email: str
    password: str = field(repr=False)

    def client(self, url: str | None = None, **options: Any) -> LabelStudio:
        """Return a client; ``url``: by way of a proxy."""
        return LabelStudio(LabelStudioHttp(url or self.url, Token(self.token), **options))

    def person(self, name: str) -> httpx.Client:
        """Return a further annotator, signed up and logged in as the page does it."""
        invite = httpx.get(
            f"{self.url}/api/invite", headers={"Authorization": f"Token {self.token}"}, timeout=60
        ).json()["invite_url"]
        client = httpx.Client(base_url=self.url, timeout=60, follow_redirects=True)
        client.get(invite)
        form = {"email": f"{name}@example.org", "password": "labelfleet", "allow_newsletters": ""}
        csrf = {"csrfmiddlewaretoken": client.cookies["csrftoken"]}
        client.post(invite, data=form | csrf, headers={"Referer": self.url}).raise_for_status()
        client.headers["X-CSRFToken"] = client.cookies["csrftoken"]
        client.headers["Referer"] = self.url
        return client


class RestartableServer:
    """A server that can be killed and started again, with the same data at the same address."""

    def __init__(self, data: Path) -> None:
        (port,) = free_ports(1)
        self.data, self.port, self.url = data, port, f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        for folder in ("files", "data"):
            (data / folder).mkdir()
        if MIGRATED.exists():
            shutil.copy(MIGRATED, data / "data" / _DATABASE)

    @property
    def server(self) -> LabelStudioServer:
        """How to reach it."""
        pid = self._process.pid if self._process else 0
        return LabelStudioServer(
            self.url, self.data / "files", pid, _TOKEN, "owner@example.org", _PASSWORD
        )

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        command = [
            str(PROGRAM), "start", "--no-browser", "--internal-host", "127.0.0.1",
            "--port", str(self.port), "--host", self.url,
        ]  # fmt: skip
        with (self.data / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=_environment(self.data), preexec_fn=_last_as_long_as_we_do(),
            )  # fmt: skip
        _wait(self._process, f"{self.url}/health", self.data / "log")
        _keep_migrated(self.data / "data" / _DATABASE)

    def kill(self) -> None:
        """As by power cut."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def restartable_label_studio() -> Iterator[RestartableServer]:
    """A running server; ended, and its data thrown away, when left."""
    data = Path(tempfile.mkdtemp(prefix="label-studio-"))
    server = RestartableServer(data)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(data, ignore_errors=True)


@contextmanager
def label_studio_server() -> Iterator[LabelStudioServer]:
    """A fresh server; ended, and its data thrown away, when left."""
    with restartable_label_studio() as running:
        yield running.server


def _last_as_long_as_we_do() -> Callable[[], None] | None:
    """Linux ends a child with the thread that started it: none for a thread that ends soon."""
    return end_with_parent if threading.current_thread() is threading.main_thread() else None


def _environment(data: Path) -> dict[str, str]:
    foreign = ("AWS_", "LABEL_STUDIO_")
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
        "HOME": str(data),
        "LABEL_STUDIO_BASE_DATA_DIR": str(data / "data"),
        "LABEL_STUDIO_USERNAME": "owner@example.org",
        "LABEL_STUDIO_PASSWORD": _PASSWORD,
        "LABEL_STUDIO_USER_TOKEN": _TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(data / "files"),
        "USE_DEFAULT_BANNED_SUBNETS": "false",  # the test's S3 is on loopback
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
    }


def _keep_migrated(database: Path) -> None:
    """For the next server; whole or not at all."""
    if not MIGRATED.exists():
        draft = MIGRATED.with_suffix(f".{os.getpid()}")
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(draft)) as copy:
            source.backup(copy)
        draft.replace(MIGRATED)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    limit = time.monotonic() + patient(_READY_TIMEOUT_S)
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            said = log.read_text(errors="replace")[-2000:]
            if process.poll() is not None:
                raise RuntimeError(f"Label Studio ended: {said}") from None
            if time.monotonic() > limit:
                raise RuntimeError(f"Label Studio was not ready in time: {said}") from None
        time.sleep(0.3)

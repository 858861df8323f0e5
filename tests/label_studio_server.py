"""A real Label Studio for tests: an environment of its own, on loopback, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from servers import end_with_parent, free_ports

from storage.label_studio import LabelStudio
from storage.label_studio_http import LabelStudioHttp
from storage.label_studio_token import Token

ROOT = Path(__file__).resolve().parent.parent
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

    def client(self, url: str | None = None, **options: float) -> LabelStudio:
        """A client; ``url``: by way of a proxy."""
        return LabelStudio(LabelStudioHttp(url or self.url, Token(self.token), **options))

    def person(self, name: str) -> httpx.Client:
        """A further annotator, signed up and logged in as the page does it."""
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


@contextmanager
def label_studio_server() -> Iterator[LabelStudioServer]:
    """A fresh server; ended, and its data thrown away, when left."""
    data = Path(tempfile.mkdtemp(prefix="label-studio-"))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "LABEL_STUDIO_"))},
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
    (data / "files").mkdir()
    (data / "data").mkdir()
    if MIGRATED.exists():
        shutil.copy(MIGRATED, data / "data" / _DATABASE)
    command = [
        str(PROGRAM), "start", "--no-browser", "--internal-host", "127.0.0.1",
        "--port", str(port), "--host", url,
    ]  # fmt: skip
    with (data / "log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    try:
        _wait(process, f"{url}/health", data / "log")
        _keep_migrated(data / "data" / _DATABASE)
        yield LabelStudioServer(
            url, data / "files", process.pid, _TOKEN, "owner@example.org", _PASSWORD
        )
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(data, ignore_errors=True)


def _keep_migrated(database: Path) -> None:
    """For the next server; whole or not at all."""
    if not MIGRATED.exists():
        draft = MIGRATED.with_suffix(f".{os.getpid()}")
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(draft)) as copy:
            source.backup(copy)
        draft.replace(MIGRATED)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    limit = time.monotonic() + _READY_TIMEOUT_S
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

"""A real Azurite, Microsoft's emulator of Azure Blob Storage, on a free loopback port."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.open import open_store
from tests.support.servers.ports import free_ports
from tests.support.servers.s3 import _process, _wait

PROGRAM = Path(__file__).parents[3] / ".azurite/node_modules/.bin/azurite-blob"
ACCOUNT = "devstoreaccount1"
# The key that Microsoft documents for every Azurite there is.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class AzuriteServer:
    """A running Azurite; ``endpoint_url`` is http://127.0.0.1:PORT/ACCOUNT."""

    endpoint_url: str
    pid: int
    scheme: ClassVar[str] = "az"

    @property
    def options(self) -> StorageOptions:
        """To reach it; few and short retries."""
        return StorageOptions(endpoint_url=self.endpoint_url, attempts=3, read_timeout_s=20)

    def env(self) -> dict[str, str]:
        """Environment variables for a process that is to use this server."""
        return {"AZURE_STORAGE_ENDPOINT": self.endpoint_url, **credentials_env()}

    def fresh_bucket(self) -> str:
        """Create an empty container; returns its name."""
        container = f"test-{uuid4().hex[:12]}"
        answer = _signed(self.endpoint_url, container)
        assert answer == 201, answer
        return container

    def fresh_store(self, prefix: str = "run") -> ObjectStore:
        """Return a store at ``prefix`` of a new container."""
        return open_store(f"az://{self.fresh_bucket()}/{prefix}", self.options)


def credentials_env() -> dict[str, str]:
    """Return what makes obstore use the emulator's account and nothing of this machine."""
    return {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY}


def _signed(endpoint: str, container: str) -> int:
    """Create a container, which obstore has no verb for, by a request with a shared key."""
    import base64
    import hashlib
    import hmac
    from datetime import UTC, datetime

    import httpx

    now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    said = "PUT" + "\n" * 12 + f"x-ms-date:{now}\nx-ms-version:2021-08-06\n"
    said += f"/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), said.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": now,
        "x-ms-version": "2021-08-06",
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    url = f"{endpoint}/{container}?restype=container"
    return httpx.put(url, headers=headers, timeout=30, trust_env=False).status_code


def _answers(endpoint: str) -> bool:
    import httpx

    try:
        return httpx.get(endpoint, timeout=5, trust_env=False).status_code > 0
    except httpx.HTTPError:
        return False


@contextmanager
def azurite_server() -> Iterator[AzuriteServer]:
    """Azurite in memory; forgets everything at the end."""
    (port,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="azurite-"))
    command: list[Any] = ["node", str(PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    try:
        with _process(command, folder / "azurite.log") as process:
            server = AzuriteServer(f"http://127.0.0.1:{port}/{ACCOUNT}", process.pid)
            _wait(process, lambda: _answers(server.endpoint_url), "Azurite")
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)

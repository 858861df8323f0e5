"""Serve a run's page on loopback until Ctrl-C: ``labelfleet browse``."""

from __future__ import annotations

import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import uvicorn

from pipelines.browse.app import Browser, make_app
from pipelines.browse.index import build_index, find_sources, open_index
from pipelines.browse.pictures import Pictures
from pipelines.browse.questions import Questions
from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from storage.runs.manifest import Manifest
from storage.stores.open import open_store

HOST = "127.0.0.1"


def browse(
    manifest: Manifest,
    options: StorageOptions,
    *,
    version: str | None,
    other: Manifest | None,
    port: int,
    say: Callable[[str], None],
) -> None:
    """Serve until the process is asked to stop.

    Args:
        manifest: the run.
        options: of the source's store.
        version: a label version; None: the latest, or none.
        other: another run over the same images, shown beside.
        port: 0: a free one.
        say: told the address once the page can be opened.

    Raises:
        ConfigError: the run has no row yet, or the port is taken.
    """
    sources = find_sources(manifest, version, other)
    source = open_store(manifest.record.source["url"], options)
    with tempfile.TemporaryDirectory(prefix="labelfleet-browse-") as folder:
        database = open_index(build_index(sources, Path(folder)))
        listener = _listen(port)
        bound = listener.getsockname()[1]
        token = secrets.token_urlsafe(24)
        browser = Browser(sources, Questions(database), Pictures(manifest, source))
        hosts = frozenset({f"{HOST}:{bound}", f"localhost:{bound}"})
        app = make_app(browser, token=token, hosts=hosts)
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        say(f"http://{HOST}:{bound}/?token={token}")
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            database.close()
            listener.close()


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"port {port} of {HOST}: {exc.strerror}", hint="choose another --port, or none"
        ) from exc
    return listener

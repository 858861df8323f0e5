"""moto's S3 server with puts one after another; run as a script with the port to listen on.

moto checks a put's condition and then writes, without a lock: of 120 races for one If-Match,
2 had two winners. S3 has one. So that moto can stand for S3, writes take turns here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

_turn = threading.Lock()
_moto = DomainDispatcherApplication(create_backend_app)


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Yield the WSGI application."""
    if environ["REQUEST_METHOD"] == "PUT":
        with _turn:
            return list(_moto(environ, start_response))
    return _moto(environ, start_response)  # type: ignore[no-any-return] # moto is untyped


if __name__ == "__main__":
    run_simple(
        "127.0.0.1", int(sys.argv[1]), app, threaded=True, request_handler=MotoRequestHandler
    )

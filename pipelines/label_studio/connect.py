"""A Label Studio that answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.label_studio.client import LabelStudio
from pipelines.label_studio.http import LabelStudioHttp
from pipelines.label_studio.token import Token

_FIRST_PATIENCE_S = 5.0  # a wrong address should not take a minute and a half to say so


@contextmanager
def open_server(url: str) -> Iterator[LabelStudio]:
    """A client with the token from the environment, closed when left.

    Raises:
        ReviewError: the server does not answer, is not a Label Studio, or refuses the token.
    """
    token = Token.from_environment()
    first = LabelStudioHttp(url, token, patience_s=_FIRST_PATIENCE_S)
    try:
        LabelStudio(first).version()
        LabelStudio(first).me()
    finally:
        first.close()
    http = LabelStudioHttp(url, token)
    try:
        yield LabelStudio(http)
    finally:
        http.close()

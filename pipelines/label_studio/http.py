"""Requests to Label Studio: authorised, patient where repeating is safe, once where it is not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

from pipelines.label_studio.errors import (
    OutcomeUnknown,
    ReviewUnavailable,
    not_json,
    refusal,
    said_by,
)
from pipelines.label_studio.token import Token
from storage.errors import ConfigError
from storage.urls import has_credentials, shown_url

log = logging.getLogger("labelfleet.review")
Method = Literal["GET", "POST", "PATCH", "DELETE"]
_BACKOFF = wait_exponential(multiplier=0.25, max=10.0)
# Nothing of the request can have reached the server.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class LabelStudioHttp:
    """One server, one token, one connection at a time.

    Args:
        url: of the server, without /api.
        token: see ``Token``; it is in no repr, log or error.
        patience_s: how long refused connections, 429 and 5xx are retried, per request.
        read_timeout_s: seconds without a byte before a reply counts as lost.
        sleep, clock: seconds; for tests.
    """

    def __init__(
        self,
        url: str,
        token: Token,
        *,
        patience_s: float = 90.0,
        read_timeout_s: float = 180.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if has_credentials(url) or "?" in url:
            raise ConfigError(
                f"review.url {shown_url(url)} has credentials or a query in it",
                hint="give the address alone; the token goes into LABEL_STUDIO_API_KEY",
            )
        self.url = url.rstrip("/")
        self.read_timeout_s = read_timeout_s
        self.sleep, self.clock = sleep, clock
        self._token, self._patience_s = token, patience_s
        try:
            self._client = httpx.Client(
                base_url=self.url,
                timeout=httpx.Timeout(read_timeout_s, connect=10.0),
                auth=token.auth(self.url),
            )
        except (httpx.InvalidURL, ValueError) as exc:
            raise ConfigError(f"review.url {url!r} is not a URL: {exc}") from exc
        base = self._client.base_url
        if base.scheme not in ("http", "https") or not base.host:
            raise ConfigError(
                f"review.url {url!r} is not a web address", hint="for example http://localhost:8080"
            )

    def __repr__(self) -> str:
        return f"LabelStudioHttp({self.url})"

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON at a path. Repeated while it fails in ways that pass."""
        return self.send("GET", path, params=params)

    def get_bytes(self, path: str, params: Mapping[str, Any] | None = None) -> bytes:
        """Return the body at a path, whatever it is."""
        return self._respond("GET", path, params, None, repeatable=True).content

    def send(
        self,
        method: Method,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        repeatable: bool = True,
    ) -> Any:
        """Send, and return the reply's JSON (None: there is none).

        Args:
            method, path, body, params: the request; ``body`` as JSON.
            repeatable: doing it twice is as good as once. Else it is sent again only when the
                server certainly did not begin it.

        Raises:
            OutcomeUnknown: not repeatable, and the reply was lost or an error of the server's.
            ReviewUnavailable: no usable answer within the patience.
            ReviewDenied, ReviewRefused: see pipelines/label_studio/errors.py.
        """
        response = self._respond(method, path, params, body, repeatable=repeatable)
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise not_json(response) from None

    def _respond(
        self,
        method: Method,
        path: str,
        params: Mapping[str, Any] | None,
        body: Any,
        *,
        repeatable: bool,
    ) -> httpx.Response:
        until_s = self.clock() + self._patience_s

        def pause(state: RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome else None
            asked = failure.wait_s if isinstance(failure, _Passing) else 0.0
            return max(_BACKOFF(state), asked)

        retrying = Retrying(
            retry=retry_if_exception_type(_Passing),
            wait=pause,
            stop=lambda state: self.clock() + state.upcoming_sleep > until_s,
            sleep=self.sleep,
            reraise=True,
        )
        request = partial(self._client.request, method, path, params=params, json=body)
        try:
            return retrying(self._once, request, f"{method} {path}", repeatable)
        except _Passing as exc:
            raise ReviewUnavailable(
                f"Label Studio at {self.url} does not answer ({exc})",
                hint="start it, or check review.url; then run the same command again",
            ) from exc.__cause__

    def _once(
        self, request: Callable[[], httpx.Response], name: str, repeatable: bool
    ) -> httpx.Response:
        """Send once.

        Raises:
            _Passing: it failed, and may be sent again.
            OutcomeUnknown: it may have been done, and is not repeatable.
        """
        try:
            response = request()
        except httpx.TransportError as exc:
            problem = f"{type(exc).__name__}: {exc}".rstrip(": ")
            begun, failed = not isinstance(exc, _UNSENT), _Passing(problem)
        else:
            if response.status_code < 300:
                return response
            if response.status_code < 500 and response.status_code not in (408, 429):
                raise refusal(response)
            problem = f"{response.status_code}: {said_by(response)}"
            begun, failed = response.status_code != 429, _Passing(problem, _retry_after(response))
        log.info("%s: %s", name, problem)
        if begun and not repeatable:
            raise OutcomeUnknown(f"{name} at {self.url} ended with {problem}")
        raise failed


class _Passing(Exception):
    """A request failed in a way that may pass; ``wait_s`` is what the server asks for."""

    def __init__(self, problem: str, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds the server asks for, within reason; dates are not understood."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked), 60.0) if asked.isdigit() else 0.0

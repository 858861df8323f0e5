"""Requests to Label Studio: authorised, patient where repeating is safe, once where it is not."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import httpx

from pipelines.label_studio.errors import (
    OutcomeUnknown,
    ReviewDenied,
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
_LONGEST_WAIT_S = 10.0
# Nothing of the request can have reached the server.
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class LabelStudioHttp:
    """One server, one token, one connection at a time.

    Args:
        url: of the server, without /api.
        token: see ``Token``; it is in no repr, log or error.
        patience_s: how long refused connections, 429 and 5xx are put up with, per request.
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
                base_url=self.url, timeout=httpx.Timeout(read_timeout_s, connect=10.0)
            )
        except (httpx.InvalidURL, ValueError) as exc:
            raise ConfigError(f"review.url {url!r} is no URL: {exc}") from exc
        base = self._client.base_url
        if base.scheme not in ("http", "https") or not base.host:
            raise ConfigError(
                f"review.url {url!r} is no web address", hint="for example http://localhost:8080"
            )

    def __repr__(self) -> str:
        return f"LabelStudioHttp({self.url})"

    @property
    def token_kind(self) -> str:
        """``legacy``, ``personal`` or ``access``."""
        return self._token.kind

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        """The JSON at a path. Repeated while it fails in ways that pass."""
        return self.send("GET", path, params=params)

    def get_bytes(self, path: str, params: Mapping[str, Any] | None = None) -> bytes:
        """The body at a path, whatever it is."""
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
        until_s, renewed = self.clock() + self._patience_s, False
        for attempt in itertools.count():
            wait_s = min(0.25 * 2**attempt, _LONGEST_WAIT_S)
            try:
                response = self._client.request(
                    method, path, params=params, json=body, headers=self._headers()
                )
            except httpx.TransportError as exc:
                problem = f"{type(exc).__name__}: {exc}".rstrip(": ")
                begun = not isinstance(exc, _UNSENT)
            else:
                if response.status_code < 300:
                    return response
                if response.status_code == 401 and self._token.renewable and not renewed:
                    self._token.expire()
                    renewed = True
                    continue
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise refusal(response)
                problem = f"{response.status_code}: {said_by(response)}"
                begun = response.status_code != 429
                wait_s = max(wait_s, _retry_after(response))
            log.info("%s %s: %s", method, path, problem)
            if begun and not repeatable:
                raise OutcomeUnknown(f"{method} {path} at {self.url} ended with {problem}")
            if self.clock() + wait_s > until_s:
                raise ReviewUnavailable(
                    f"Label Studio at {self.url} does not answer ({problem})",
                    hint="start it, or check review.url; then run the same command again",
                )
            self.sleep(wait_s)
        raise AssertionError("unreachable")

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token.header(self._exchange)}

    def _exchange(self, personal: str) -> str:
        """A short-lived access token for a personal one; transport errors go to the caller."""
        response = self._client.post("/api/token/refresh", json={"refresh": personal})
        if response.status_code >= 500:
            raise httpx.ReadError(f"the token exchange ended with {response.status_code}")
        try:
            return str(response.json()["access"])
        except (ValueError, KeyError, TypeError):
            raise ReviewDenied(
                "Label Studio does not take the personal access token: "
                + said_by(response).replace(personal, "***"),
                hint="it may be revoked or expired: create one in Account & Settings",
            ) from None


def _retry_after(response: httpx.Response) -> float:
    """Seconds the server asks for, within reason; dates are not understood."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked), 60.0) if asked.isdigit() else 0.0

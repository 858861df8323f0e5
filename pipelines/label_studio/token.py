"""Label Studio's two kinds of tokens, and how each gets into a request.

A legacy token (40 hex digits) goes into every request as it is. A personal access token is a JWT
that only buys access tokens of five minutes; sent as it is, it is refused with a bare 401.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Generator
from typing import Literal

import httpx

from pipelines.label_studio.errors import ReviewDenied, said_by
from storage.errors import ConfigError

VARIABLE = "LABEL_STUDIO_API_KEY"
Kind = Literal["legacy", "personal", "access"]


class Token:
    """A token that is shown only to the server: never in a repr, log or error.

    Attributes:
        kind: ``legacy``, ``personal`` (buys access tokens), or ``access`` (lives for minutes).
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.strip()
        self.kind: Kind = _kind(self._secret)

    @staticmethod
    def from_environment() -> Token:
        """Return the token in LABEL_STUDIO_API_KEY. Raises ConfigError when there is none."""
        secret = os.environ.get(VARIABLE, "")
        if not secret.strip():
            raise ConfigError(
                f"{VARIABLE} is not set",
                hint="put a token from Label Studio's Account & Settings page into it",
            )
        return Token(secret)

    def __repr__(self) -> str:
        return f"Token({self.kind}, ***)"

    def auth(self, url: str) -> httpx.Auth:
        """Return the httpx auth that puts the token into requests to the server at ``url``."""
        return _TokenAuth(self._secret, self.kind, f"{url}/api/token/refresh")


class _TokenAuth(httpx.Auth):
    """Sends a token, or the access token that a personal one buys; renews that after a 401."""

    requires_response_body = True

    def __init__(self, secret: str, kind: Kind, exchange_url: str) -> None:
        self._secret, self._exchange_url = secret, exchange_url
        self._personal = kind == "personal"
        scheme = "Token" if kind == "legacy" else "Bearer"
        self._header = "" if self._personal else f"{scheme} {secret}"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request; a second time only where the first had an expired access token.

        Raises:
            ReviewDenied: the server does not take the personal token.
            httpx.ConnectError: the exchange failed; the request itself was not sent.
        """
        if not self._header:
            yield from self._exchange(request)
        request.headers["Authorization"] = self._header
        response = yield request
        if response.status_code == 401 and self._personal:
            yield from self._exchange(request)
            request.headers["Authorization"] = self._header
            yield request

    def _exchange(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        self._header = ""
        response = yield httpx.Request(
            "POST", self._exchange_url, json={"refresh": self._secret},
            extensions=request.extensions,  # the timeouts
        )  # fmt: skip
        if response.status_code >= 500:
            raise httpx.ConnectError(f"the token exchange ended with {response.status_code}")
        try:
            self._header = f"Bearer {response.json()['access']}"
        except (ValueError, KeyError, TypeError):
            raise ReviewDenied(
                "Label Studio does not take the personal access token: "
                + said_by(response).replace(self._secret, "***"),
                hint="it may be revoked or expired: create one in Account & Settings",
            ) from None


def _kind(secret: str) -> Kind:
    if re.fullmatch(r"[0-9a-f]{40}", secret):
        return "legacy"
    kind = _claims(secret).get("token_type")
    if kind == "refresh":
        return "personal"
    if kind == "access":
        return "access"
    raise ConfigError(
        f"{VARIABLE} holds no token of Label Studio",
        hint="a personal access token starts with `ey` and has two dots; a legacy token is 40 "
        "hexadecimal digits; both are on the Account & Settings page",
    )


def _claims(secret: str) -> dict[str, object]:
    """Return a JWT's claims, unverified; {} for anything else. The server verifies them."""
    parts = secret.split(".")
    if len(parts) != 3:
        return {}
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}

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
from collections.abc import Callable
from typing import Literal

from storage.errors import ConfigError

VARIABLE = "LABEL_STUDIO_API_KEY"
Kind = Literal["legacy", "personal", "access"]


class Token:
    """A token that shows itself to nobody but the server.

    Attributes:
        kind: ``legacy``, ``personal`` (buys access tokens), or ``access`` (lives for minutes).
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.strip()
        self._access: str | None = None
        self.kind: Kind = _kind(self._secret)

    @staticmethod
    def from_environment() -> Token:
        """The token in LABEL_STUDIO_API_KEY. Raises ConfigError when there is none."""
        secret = os.environ.get(VARIABLE, "")
        if not secret.strip():
            raise ConfigError(
                f"{VARIABLE} is not set",
                hint="put a token from Label Studio's Account & Settings page into it",
            )
        return Token(secret)

    def __repr__(self) -> str:
        return f"Token({self.kind}, ***)"

    @property
    def renewable(self) -> bool:
        """Whether a 401 may only mean that the access token has expired."""
        return self.kind == "personal"

    def header(self, exchange: Callable[[str], str]) -> str:
        """The Authorization header.

        Args:
            exchange: buys an access token for the personal one; called when there is none yet.
        """
        if self.kind == "legacy":
            return f"Token {self._secret}"
        if self.kind == "access":
            return f"Bearer {self._secret}"
        if self._access is None:
            self._access = exchange(self._secret)
        return f"Bearer {self._access}"

    def expire(self) -> None:
        """Forget the access token; the next header buys another."""
        self._access = None


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
    """What a JWT says about itself; {} for anything else. The server checks it, not we."""
    parts = secret.split(".")
    if len(parts) != 3:
        return {}
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}

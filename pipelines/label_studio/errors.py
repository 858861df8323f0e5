"""Errors of Label Studio below ``ReviewError``: one class for each way to continue.

ReviewError
├── ReviewUnavailable    no answer, or 429 and 5xx, for as long as we were patient
├── OutcomeUnknown       a request that must not be repeated blindly: it may have been done
├── ReviewDenied         401, 403: the token, or what its owner may do
└── ReviewRefused        any other 4xx; ``status`` and the server's own words
    └── RequestTooLarge  413
"""

from __future__ import annotations

import re

import httpx

from storage.errors import ReviewError

_LONGEST = 400


class ReviewUnavailable(ReviewError):
    """Label Studio did not answer; try again later."""


class OutcomeUnknown(ReviewError):
    """The reply to a request was lost: look whether it was done before sending it again."""


class ReviewDenied(ReviewError):
    """The token is wrong, or its owner lacks the permission."""


class ReviewRefused(ReviewError):
    """A request that Label Studio understood and refused."""

    def __init__(self, message: str, *, status: int = 400, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class RequestTooLarge(ReviewRefused):
    """The body is larger than the server, or a proxy before it, takes."""


def refusal(response: httpx.Response) -> ReviewError:
    """Return the error for a response that a retry will not change."""
    status, said = response.status_code, said_by(response)
    what = f"Label Studio answered {status} to {response.request.method} {_path(response)}: {said}"
    if status in (401, 403):
        return ReviewDenied(what, hint=_about_token(said))
    if status == 413:
        return RequestTooLarge(what, status=status, hint="raise the body limit of its proxy")
    if 300 <= status < 400:
        moved = response.headers.get("location", "another address")
        return ReviewRefused(
            f"Label Studio redirects to {moved}", status=status, hint="give that URL instead"
        )
    return ReviewRefused(what, status=status)


def not_json(response: httpx.Response) -> ReviewError:
    """Return the error for a response that does not come from Label Studio."""
    return ReviewRefused(
        f"{response.request.url.copy_with(query=None)} answered with something else than JSON",
        status=response.status_code,
        hint="is this the address of Label Studio itself, without a path?",
    )


def said_by(response: httpx.Response) -> str:
    """Return the server's message, shortened; never HTML or the token: proxies echo headers."""
    secret = response.request.headers.get("authorization", "").rpartition(" ")[2]
    said = _said(response)
    return said.replace(secret, "***") if secret else said


def _said(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        text = "" if "<html" in response.text.lower() else response.text
        return shorten(text) or response.reason_phrase
    if not isinstance(body, dict):
        return shorten(str(body))
    parts = [body.get("detail"), body.get("validation_errors"), body.get("error")]
    return shorten("; ".join(str(part) for part in parts if part) or str(body))


def shorten(text: str) -> str:
    """Shorten a text to one line of bounded length."""
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _path(response: httpx.Response) -> str:
    return response.request.url.path


def _about_token(said: str) -> str:
    if "legacy" in said.lower():
        return (
            "legacy tokens are switched off there: create a personal access token in "
            "Account & Settings, or switch legacy tokens on in Organization > API Tokens Settings"
        )
    return "LABEL_STUDIO_API_KEY must hold a token of someone who may change the project"

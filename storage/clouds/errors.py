"""Translate obstore's errors into the error tree; their text may hold signed URLs and is left
out."""

from __future__ import annotations

import re

from obstore import exceptions as cloud

from storage.errors import (
    AccessDenied,
    BucketNotFound,
    LabelfleetError,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)

_STATUS = re.compile(r"status code: (\d{3})")
_NO_BUCKET = ("ContainerNotFound", "NoSuchBucket", "bucket does not exist")
# How an error of the chain that finds credentials begins. It is not about the object, whatever
# status it names: a metadata server may well answer 403 or 404.
_CHAIN = re.compile(
    r"Generic (\w*CryptoProvider error|\w+ error: (Error performing token request|Error reading "
    r"(federated token|pem) file|Unable to \w+ service account|Account must be specified|"
    r"Invalid Access Key|Missing component in SAS))"
)
_CREDENTIALS = re.compile(r"token request|credential|metadata|signing key|service account", re.I)
_TRANSPORT = re.compile(r"error sending request|timed? ?out|connect|error decoding|body", re.I)
_HINTS = {
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, log in with gcloud, or give the machine a service "
    "account",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or _SAS_TOKEN, log in "
    "with az, or give the machine a managed identity",
}


def is_lost(exc: Exception) -> bool:
    """Return whether the condition of a conditional request does not hold."""
    kinds = (cloud.AlreadyExistsError, cloud.PreconditionError, cloud.NotModifiedError)
    return isinstance(exc, kinds) or status_of(exc) == 412


def is_conflict(exc: Exception) -> bool:
    """Return whether two writes met on the server; the same request may succeed when sent again."""
    return not is_lost(exc) and (status_of(exc) == 409 or too_often(exc))


def too_often(exc: Exception) -> bool:
    """Return whether the server asks to write this object less often (429 of Cloud Storage)."""
    return status_of(exc) == 429


def status_of(exc: Exception) -> int:
    """Return the HTTP status that an error of obstore names, 0 where it names none."""
    found = _STATUS.search(str(exc))
    return int(found[1]) if found else 0


def from_cloud_error(exc: Exception, where: str, scheme: str) -> LabelfleetError:
    """Return the labelfleet error for an error of obstore.

    Args:
        exc: what obstore raised.
        where: the object and its bucket, for the message.
        scheme: ``gs`` or ``az``, for the hint about credentials.
    """
    if isinstance(exc, LabelfleetError):
        return exc
    text, status = str(exc), status_of(exc)
    if any(mark in text for mark in _NO_BUCKET):
        return BucketNotFound(
            f"the bucket or container of {where} does not exist",
            hint="check its spelling, the account and the endpoint, or create it",
        )
    if _CHAIN.match(text):
        return AccessDenied(f"no usable credentials for {where}", hint=_HINTS[scheme])
    if isinstance(exc, cloud.NotFoundError | FileNotFoundError):
        return ObjectNotFound(f"{where} does not exist")
    if isinstance(exc, cloud.InvalidPathError):
        return StorageError(f"{where}: such a key cannot be stored there", hint="rename the file")
    if status == 507:
        return StorageError(f"no space left for {where}")
    denied = (cloud.PermissionDeniedError, cloud.UnauthenticatedError, PermissionError)
    if isinstance(exc, denied) or status in (401, 403):
        code = f" (HTTP {status})" if status else ""
        return AccessDenied(f"access to {where} was refused{code}", hint=_HINTS[scheme])
    if status == 429 or status >= 500:
        return StorageUnavailable(
            f"{where}: the server still answered {status} after several tries",
            hint="it is overloaded or down: run the same command again later",
        )
    if not status and _TRANSPORT.search(text):
        return StorageUnavailable(
            f"{where} could not be reached",
            hint="check the network, and the endpoint if you set one",
        )
    if not status and _CREDENTIALS.search(text):
        return AccessDenied(f"no usable credentials for {where}", hint=_HINTS[scheme])
    return StorageError(f"{where}: {type(exc).__name__}" + (f" (HTTP {status})" if status else ""))


class Lost(Exception):
    """The condition of a conditional write does not hold."""


class Busy(StorageUnavailable):
    """Two writes of one object met."""


class Torn(StorageUnavailable):
    """A connection could not be made, or broke within a reply."""

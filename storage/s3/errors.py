"""Translate botocore's errors into the error tree, in actionable words and without secrets."""

from __future__ import annotations

from botocore import exceptions as boto

from storage.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    LabelfleetError,
    ObjectNotFound,
    ObjectUnreadable,
    ShortRead,
    StorageError,
    StorageFull,
    StorageUnavailable,
)

_NO_OBJECT = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchVersion"})
_CHANGED = frozenset({"PreconditionFailed", "412"})
CONFLICT = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
_FULL = frozenset(
    {
        "InsufficientStorage",
        "507",
        "QuotaExceeded",
        "XMinioStorageFull",
        "XMinioAdminBucketQuotaExceeded",
    }
)
_UNAVAILABLE = frozenset(
    {
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "InternalError",
        "ServiceUnavailable",
        "RequestTimeout",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "TooManyRequestsException",
        "429",
    }
)
_WRONG_KEY_HINT = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the AWS profile) on this machine"
)
_DENIED_HINTS = {
    "InvalidAccessKeyId": _WRONG_KEY_HINT,
    "SignatureDoesNotMatch": _WRONG_KEY_HINT,
    "AuthFailure": _WRONG_KEY_HINT,
    "ExpiredToken": "the session has expired: log in again (for example `aws sso login`)",
    "InvalidToken": "AWS_SESSION_TOKEN belongs to another session: unset it or log in again",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it right",
    "AccessDenied": "the credentials work, but their policy forbids this request on the bucket",
    "403": "wrong credentials, a policy that forbids it, or (without the right to list the "
    "bucket) an object that does not exist",
    "Forbidden": "wrong credentials, or a policy that forbids it",
    "AllAccessDisabled": "the bucket is disabled; ask its owner",
    "AccountProblem": "there is a problem with the AWS account; ask its owner",
}
_REGION_HINT = "set storage.region (or AWS_REGION) to the bucket's region"
_REGION_CODES = frozenset(
    {
        "PermanentRedirect",
        "301",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    }
)
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.InvalidConfigError,
    boto.RefreshWithMFAUnsupportedError,
)
_SHORT = (boto.IncompleteReadError,)


def code_of(exc: Exception) -> str:
    """Return S3's error code ('' if the error is not from S3)."""
    return str(getattr(exc, "response", {}).get("Error", {}).get("Code", ""))


def is_precondition_failure(exc: Exception) -> bool:
    """Return whether the server said that If-Match or If-None-Match does not hold."""
    return _answered(exc) and (code_of(exc) in _CHANGED or _status_of(exc) == 412)


def is_range_failure(exc: Exception) -> bool:
    """Return whether the server said that the object ends before the range begins."""
    return _answered(exc) and (code_of(exc) == "InvalidRange" or _status_of(exc) == 416)


def is_conflict(exc: Exception) -> bool:
    """Return whether two conditional writes met; the same request may succeed when sent again."""
    return _answered(exc) and (code_of(exc) in CONFLICT or _status_of(exc) == 409)


def from_s3_error(exc: Exception, where: str, bucket: str) -> LabelfleetError:
    """Return the labelfleet error for a botocore error.

    Args:
        exc: a ClientError, another BotoCoreError, or a ValueError from making the client.
        where: the object, its bucket and the endpoint, for the message.
        bucket: for the message about a bucket that is missing.
    """
    if _answered(exc):
        return _from_answer(exc, where, bucket)
    if isinstance(exc, _NO_CREDENTIALS):
        return AccessDenied(
            f"no usable S3 credentials on this machine for {where}",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            "or give the machine a role",
        )
    if isinstance(exc, _SHORT) or _ended_early(exc):
        return ShortRead(f"{where}: the reply ended early, again and again")
    return _from_transport(exc, where)


def _answered(exc: Exception) -> bool:
    return isinstance(exc, boto.ClientError)


def _status_of(exc: Exception) -> int:
    response = getattr(exc, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _ended_early(exc: Exception) -> bool:
    return isinstance(exc, boto.ResponseStreamingError) and "IncompleteRead" in str(exc)


def _from_answer(exc: Exception, where: str, bucket: str) -> LabelfleetError:
    code, status = code_of(exc), _status_of(exc)
    if code == "NoSuchBucket":
        return BucketNotFound(
            f"the bucket '{bucket}' does not exist ({where})",
            hint="check its spelling and the endpoint, or create it",
        )
    if code in _NO_OBJECT:
        return ObjectNotFound(f"{where} does not exist")
    if code == "InvalidObjectState":
        return ObjectUnreadable(
            f"{where} is archived and cannot be read",
            hint="restore it from its storage class (Glacier), then run the same command",
        )
    if code in _FULL or status == 507:
        return StorageFull(
            f"no space left for {where}", hint="free some space there and run the same command"
        )
    if code in _REGION_CODES:
        return StorageError(f"{where} is in another region ({code})", hint=_REGION_HINT)
    if code == "EntityTooLarge":
        return StorageError(
            f"{where} is too large for one PutObject (5 GiB on AWS)", hint="make smaller shards"
        )
    if code in _DENIED_HINTS or status in (401, 403):
        hint = _DENIED_HINTS.get(code, _DENIED_HINTS["Forbidden"])
        return AccessDenied(f"access to {where} was refused ({code})", hint=hint)
    if code in _UNAVAILABLE or status >= 500:
        return StorageUnavailable(
            f"{where}: the server still answered {code or status} after several tries",
            hint="it is overloaded or down: run the same command again later",
        )
    return StorageError(f"{where}: the server answered {code} (HTTP {status})")


def _from_transport(exc: Exception, where: str) -> LabelfleetError:
    if isinstance(exc, boto.SSLError):
        return StorageUnavailable(
            f"{where}: the encrypted connection failed",
            hint="http:// instead of https:// in the endpoint, or AWS_CA_BUNDLE for a "
            "private certificate",
        )
    if isinstance(exc, boto.ParamValidationError | boto.InvalidRegionError | ValueError):
        return ConfigError(
            f"{where} cannot be asked for: bucket name, region or endpoint is not valid",
            hint="an endpoint looks like http://127.0.0.1:9000",
        )
    if isinstance(exc, boto.HTTPClientError | boto.ConnectionError | boto.ResponseStreamingError):
        return StorageUnavailable(
            f"{where} could not be reached ({type(exc).__name__})",
            hint="check the network, and the endpoint if you set one",
        )
    return StorageError(f"{where}: {type(exc).__name__}")

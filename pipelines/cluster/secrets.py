"""Find what looks like a secret and must not travel with a job: Ray stores a job's inputs.

The runtime environment, the metadata, the entry point and the packed files of a job are stored on
the head and shown to anyone who may list the cluster's jobs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from storage.errors import ConfigError

_NAME = re.compile(
    r"secret|token|passw(or)?d|passphrase|credential|api_?key|access_?key|private_?key|webhook",
    re.IGNORECASE,
)
# A variable that names the path of a mounted secret does not hold the secret.
_PLACE = re.compile(r"_(FILE|PATH|DIR|ARN|URI)\Z", re.IGNORECASE)
_VALUES = {
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "an Azure account key": re.compile(r"\bAccountKey=[A-Za-z0-9+/]{40,}"),
    "a Google API key": re.compile(r"\bAIza[\w-]{35}\b|\bya29\.[\w-]{20,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a signed token": re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"),
    "an access token": re.compile(
        r"\b(gh[opsu]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|hf_\w{20,}|xox[abprs]-[\w-]{10,})"
    ),
    "a URL with credentials": re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]*@", re.IGNORECASE),
}
_WEBHOOK = re.compile(
    r"hooks\.slack\.com/|discord(app)?\.com/api/webhooks/|webhook\.office\.com/|/webhooks?/\S{16,}",
    re.IGNORECASE,
)
_SIGNED = re.compile(r"sig(nature)?|token|key|secret|passw(or)?d|credential|auth", re.IGNORECASE)

# What a job's environment may say in plain text. An allow-list, since a secret has many names.
_PLAIN_NAMES = re.compile(
    r"AWS_(DEFAULT_)?REGION|AWS_ENDPOINT_URL(_S3)?|AWS_PROFILE|AWS_ROLE_SESSION_NAME|AWS_RETRY_MODE"
    r"|AWS_MAX_ATTEMPTS|AWS_CA_BUNDLE|AWS_REQUEST_CHECKSUM_CALCULATION"
    r"|LABELFLEET_(LOG|CACHE)|(OMP|MKL|OPENBLAS)_NUM_THREADS|CUDA_VISIBLE_DEVICES|NCCL_DEBUG"
    r"|(HTTPS?|NO|ALL)_PROXY|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|TZ|LANG|LC_ALL|TMPDIR|PYTHONPATH|GOOGLE_CLOUD_PROJECT|GOOGLE_BASE_URL"
    r"|STORAGE_EMULATOR_HOST|AZURE_STORAGE_ACCOUNT(_NAME)?|AZURE_(STORAGE_)?ENDPOINT"
    r"|AZURE_(CLIENT|TENANT)_ID"
    r"|RAY_(?!AUTH_TOKEN\Z)[A-Z0-9_]+",
    re.IGNORECASE,
)
# Any other name may say where a value lies, on the nodes.
_REFERENCE = re.compile(r"(file:/|/)[^\s=;,@]*|arn:[\w-]+:[^\s=;,]*")

MOUNT_IT = (
    "let the nodes have it: an instance role (IRSA on EKS) for storage, or a mounted secret with "
    "its path in a variable such as X_FILE; docs/scheduling.md shows both"
)


def refuse_secrets(config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Refuse what a job must not carry. The message names the place, never the value.

    Args:
        config: the run's config as a mapping.
        environment: variables of the job.

    Raises:
        ConfigError: it carries a secret; the hint says what to do instead.
    """
    for path, text in texts_in(config):
        # A webhook's address is a secret in itself: anyone who knows it can post there.
        kind = secret_in(text) or ("a webhook's address" if path == "notify" else None)
        if kind is not None:
            raise ConfigError(
                f"{path} holds {kind}, which would be kept with the job and shown by the cluster",
                hint="put the config itself where only the cluster's role reads it (s3://…) and "
                "submit that URL: it is then read there, and nothing of it travels"
                if path == "notify"
                else MOUNT_IT,
            )
    for name, text in environment.items():
        _refuse_variable(name, text)


def _refuse_variable(name: str, text: str) -> None:
    kind = secret_in(text)
    if _NAME.search(name) and not _PLACE.search(name) and not _REFERENCE.fullmatch(text):
        kind = "a secret, by its name"
    if kind is not None:
        raise ConfigError(
            f"--env {name} holds {kind}, which anyone who sees the job could read",
            hint=MOUNT_IT,
        )
    if not _PLAIN_NAMES.fullmatch(name) and not _REFERENCE.fullmatch(text):
        raise ConfigError(
            f"--env {name} is not one of the variables that may travel in plain text",
            hint="those are settings of the clouds, Ray, proxies, threads and locale, see "
            "docs/scheduling.md; any other may name a path on the nodes "
            f"(--env {name}=/run/secrets/x), or be set in their own environment",
        )


def texts_in(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a nested config with its path, such as ``model.checkpoint``."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts_in(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from texts_in(inner, f"{path}[{position}]")


def secret_in(text: str) -> str | None:
    """Return the kind of secret that a text looks like, or None."""
    for kind, pattern in _VALUES.items():
        if pattern.search(text):
            return kind
    if "://" not in text:
        return None
    if _WEBHOOK.search(text):
        return "a webhook's address"
    try:
        query = parse_qsl(urlsplit(text).query)
    except ValueError:
        return None
    if any(_SIGNED.search(name) and value for name, value in query):
        return "a signed URL"
    return None

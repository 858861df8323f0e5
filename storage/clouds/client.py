"""The obstore client under CloudStore: which account, which endpoint, how long to try."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from storage.urls import Location, has_credentials, shown_url

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_ENDPOINT_VARIABLES = {
    "gs": ("STORAGE_EMULATOR_HOST", "GOOGLE_BASE_URL"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
}
# The emulator's account, the same on every machine: not a secret.
_AZURITE_ACCOUNT = "devstoreaccount1"
# The whole chain ends well before an unanswered request could be taken for a hang.
_RETRY_TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True, slots=True)
class CloudPlace:
    """Where a store lives.

    Attributes:
        scheme: ``gs`` or ``az``.
        bucket: the bucket, or Azure's container.
        account: Azure's storage account; '': AZURE_STORAGE_ACCOUNT_NAME.
    """

    scheme: str
    bucket: str
    account: str = ""

    @classmethod
    def of(cls, place: Location) -> CloudPlace:
        """Return the place that a parsed gs:// or az:// URL names.

        Raises:
            ConfigError: the bucket cannot exist.
        """
        bucket, _, host = place.authority.partition("@")
        if not re.fullmatch(r"[a-z0-9$][a-z0-9._-]{1,220}", bucket):
            raise ConfigError(
                f"'{shown_url(place.url)}' does not name a bucket or a container",
                hint="write gs://bucket/prefix, az://container/prefix or "
                "abfs://container@account.dfs.core.windows.net/prefix",
            )
        return cls(place.scheme, bucket, host.partition(".")[0])


def endpoint_of(scheme: str, options: StorageOptions) -> str | None:
    """Return the endpoint of an emulator or a private gateway; None: the cloud itself.

    The cloud's own variable comes before ``endpoint_url``, which a run's S3 server may need.

    Raises:
        ConfigError: plain http to another machine, or credentials in the URL.
    """
    named = next(filter(None, map(os.environ.get, _ENDPOINT_VARIABLES[scheme])), None)
    endpoint = named or options.endpoint_url
    if not endpoint:
        return None
    if "://" not in endpoint:  # STORAGE_EMULATOR_HOST is often host:port alone
        endpoint = f"http://{endpoint}"
    parts = urlsplit(endpoint)
    if has_credentials(endpoint) or parts.query:
        raise ConfigError(
            f"credentials do not belong in an endpoint ({shown_url(endpoint)})",
            hint="leave them out; they come from the environment of this machine",
        )
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ConfigError(
            f"the endpoint {shown_url(endpoint)} is neither https:// nor on this machine",
            hint="plain http is for emulators on 127.0.0.1",
        )
    return endpoint.rstrip("/")


def make_client(place: CloudPlace, options: StorageOptions) -> Any:
    """Return a thread-safe obstore client; credentials come from the cloud's own chain."""
    from obstore.store import AzureStore, GCSStore

    endpoint = endpoint_of(place.scheme, options)
    timeouts: Any = {
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "read_timeout": timedelta(seconds=options.read_timeout_s),
        "timeout": timedelta(hours=1),  # a whole transfer; read_timeout_s notices a standstill
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
    }
    retries: Any = {"max_retries": options.attempts - 1, "retry_timeout": _RETRY_TIMEOUT}
    if place.scheme == "gs":
        return GCSStore(
            place.bucket, config=_gs(endpoint), client_options=timeouts, retry_config=retries
        )
    return AzureStore(
        place.bucket, config=_az(place, endpoint), client_options=timeouts, retry_config=retries
    )


def _gs(endpoint: str | None) -> Any:
    config = {} if endpoint is None else {"base_url": endpoint}
    if endpoint is not None and endpoint.startswith("http://"):
        config["bearer_token"] = "none"  # noqa: S105  # the client wants one, an emulator does not
    return config


def _az(place: CloudPlace, endpoint: str | None) -> Any:
    config: dict[str, Any] = {} if endpoint is None else {"endpoint": endpoint}
    account = place.account or os.environ.get("AZURE_STORAGE_ACCOUNT")
    if account:
        config["account_name"] = account
    if endpoint is not None and endpoint.startswith("http://"):
        path = urlsplit(endpoint).path.strip("/")
        config["account_name"] = place.account or path or _AZURITE_ACCOUNT
        config["endpoint"] = endpoint if path else f"{endpoint}/{config['account_name']}"
    return config

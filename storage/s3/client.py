"""The boto3 client under S3Store: retries, timeouts, checksums, and a quick way to read times."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.utils import parse_timestamp

from storage.objects.protocols import StorageOptions

_CONNECTIONS = 32  # per client; the thread pipeline of one worker stays well below


def make_client(options: StorageOptions) -> tuple[Any, botocore.session.Session]:
    """Return a thread-safe boto3 S3 client and its session; credentials come from boto3's own
    chain."""
    endpoint = endpoint_of(options)
    path_style = options.path_style if options.path_style is not None else endpoint is not None
    # Servers other than AWS often do not know the newer trailing checksums.
    checksums = "when_required" if endpoint else "when_supported"
    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=_CONNECTIONS,
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        s3={"addressing_style": "path" if path_style else "auto"},
    )
    core = botocore.session.get_session()
    parsers = core.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=parse_time)
    session = boto3.session.Session(botocore_session=core, region_name=options.region)
    return session.client("s3", endpoint_url=endpoint, config=config), core


def parse_time(value: Any) -> datetime:
    """Parse a time as S3 writes it. botocore's parser, which accepts every format, takes two
    thirds of the time for a page of a listing."""
    if isinstance(value, str) and value.endswith("Z"):
        with suppress(ValueError):
            return datetime.fromisoformat(value)
    parsed: datetime = parse_timestamp(value)
    return parsed


def endpoint_of(options: StorageOptions) -> str | None:
    """Return the endpoint from the options or the environment; None: AWS."""
    return (
        options.endpoint_url
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or None
    )

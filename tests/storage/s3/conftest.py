"""A bucket on moto, straight and through a proxy that does not behave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.objects.protocols import ObjectStore
from storage.stores.open import open_store
from tests.support.servers.proxy import FaultyProxy, faulty_proxy
from tests.support.servers.s3 import S3Server


@pytest.fixture
def proxy(moto_s3: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(moto_s3.endpoint_url) as running:
        yield running


@pytest.fixture
def bucket(moto_s3: S3Server) -> str:
    return moto_s3.fresh_bucket()


@pytest.fixture
def direct(moto_s3: S3Server, bucket: str) -> ObjectStore:
    return open_store(f"s3://{bucket}/run", moto_s3.options)

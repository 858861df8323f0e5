"""How boto3 reaches a bucket, taken from the requests that it really makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import boto3
import botocore.awsrequest
import pytest
from botocore.config import Config

from storage.s3.quick_reads import Way


class TestTheWay:
    """What boto3 really sends, caught before it leaves."""

    def sent(
        self, monkeypatch: pytest.MonkeyPatch, *, bucket: str = "photos", key: str = "a/b c.jpg",
        region: str = "eu-north-1", asked: dict[str, Any] | None = None, **settings: Any,
    ) -> Way | None:  # fmt: skip
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        client = boto3.client(
            "s3", region_name=region, aws_access_key_id="AKIA", aws_secret_access_key="s",
            aws_session_token="t", endpoint_url=settings.pop("endpoint", None),
            config=Config(**settings),
        )  # fmt: skip
        seen: list[Any] = []

        def catch(request: Any, **_: Any) -> Any:
            seen.append(request)
            return botocore.awsrequest.AWSResponse(request.url, 404, {}, _Empty())

        client.meta.events.register("before-send.s3.GetObject", catch)
        with pytest.raises(client.exceptions.ClientError):
            client.get_object(
                Bucket=bucket, Key=key, IfMatch='"1"', Range="bytes=0-1", **asked or {}
            )
        assert key in unquote(seen[0].url)
        return Way.of(seen[0].url, seen[0].headers, bucket, key)

    def test_aws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        at = "https://photos.s3.eu-north-1.amazonaws.com"
        assert self.sent(monkeypatch) == Way(at, True, "eu-north-1")

    def test_a_bucket_with_dots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.sent(monkeypatch, bucket="photos.example.org")
        assert found == Way("https://s3.eu-north-1.amazonaws.com", False, "eu-north-1")

    def test_fips_and_dual_stack(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.sent(
            monkeypatch, region="us-east-2", use_fips_endpoint=True, use_dualstack_endpoint=True
        )
        at = "https://photos.s3-fips.dualstack.us-east-2.amazonaws.com"
        assert found == Way(at, True, "us-east-2")

    def test_a_server_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.sent(
            monkeypatch, endpoint="http://[::1]:9000", s3={"addressing_style": "path"}
        )
        assert found == Way("http://[::1]:9000", False, "eu-north-1")

    @pytest.mark.parametrize(
        "special",
        [
            {"asked": {"RequestPayer": "requester"}},
            {"asked": {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}},
            {"asked": {"VersionId": "v"}},
            {"bucket": "arn:aws:s3:eu-north-1:123456789012:accesspoint/photos"},
            {"bucket": "arn:aws:s3-object-lambda:eu-north-1:123456789012:accesspoint/photos"},
            {"endpoint": "http://127.0.0.1:9000/gateway", "s3": {"addressing_style": "path"}},
            {"signature_version": botocore.UNSIGNED},
            {"signature_version": "s3"},
        ],
        ids=lambda special: "-".join(special),
    )
    def test_what_is_left_to_boto3(
        self, monkeypatch: pytest.MonkeyPatch, special: dict[str, Any]
    ) -> None:
        assert self.sent(monkeypatch, **special) is None


class _Empty:
    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        return iter(())

    def read(self, *_: Any, **__: Any) -> bytes:
        return b""

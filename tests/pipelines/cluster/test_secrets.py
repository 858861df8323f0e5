"""What looks like a secret stays at home; what does not, travels."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.cluster.secrets import refuse_secrets, secret_in
from storage.errors import ConfigError

KEY = "AKIA" + "ABCDEFGHIJKLMNOP"  # in two, so that no scanner takes it for one

SECRETS = [
    KEY,
    f"x={KEY} y",
    "-----BEGIN RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nMII",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl",
    "ghp_" + "a" * 36,
    "hf_" + "a" * 34,
    "xoxb-123456789012",
    "AccountName=x;AccountKey=" + "b" * 86 + "==",
    "AIza" + "b" * 35,
    "https://user:word@host/x",
    "https://hooks.slack.com/services/T0/B0/xyz",
    "https://host/img?X-Amz-Signature=abc",
    "https://host/img?token=abc",
    "https://host/hook?sig=abc",
]
PLAIN = [
    "s3://plates/shards/",
    "cells.pth",
    "https://host/weights.pth",
    "https://host/weights.pth?download=1",
    "http://127.0.0.1:9000",
    "ab" * 32,
    "blood-cells",
    "file:///mnt/a@b/c",
    "the token ring",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_seen_wherever_it_stands(text: str) -> None:
    assert secret_in(text) is not None
    with pytest.raises(ConfigError) as refused:
        refuse_secrets({"model": {"classes": ["a", text]}}, {})
    assert refused.value.message.startswith("model.classes[1] holds ")
    with pytest.raises(ConfigError, match="--env AWS_PROFILE holds") as refused:
        refuse_secrets({}, {"AWS_PROFILE": text})
    assert text not in str(refused.value)


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_not_a_secret_travels(text: str) -> None:
    refuse_secrets({"source": {"url": text}}, {"AWS_PROFILE": text})


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "LABEL_STUDIO_API_KEY", "RAY_AUTH_TOKEN",
     "DB_PASSWORD", "apikey", "GOOGLE_CREDENTIALS"],
)  # fmt: skip
def test_a_variable_named_like_a_secret_is_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--env {name} ") as refused:
        refuse_secrets({}, {name: "hunter2"})
    assert "hunter2" not in str(refused.value)
    assert "mounted secret" in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["AWS_WEB_IDENTITY_TOKEN_FILE", "RAY_AUTH_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE",
     "AWS_REGION", "AZURE_STORAGE_ENDPOINT", "AZURE_CLIENT_ID", "STORAGE_EMULATOR_HOST",
     "OMP_NUM_THREADS", "HTTPS_PROXY"],
)  # fmt: skip
def test_the_path_of_a_secret_is_not_a_secret(name: str) -> None:
    refuse_secrets({}, {name: "/var/run/secrets/x"})


@pytest.mark.parametrize("hook", ["https://hooks.slack.com/services/T0/xyz", "http://here/xyz"])
def test_a_webhook_is_told_where_to_go(hook: str) -> None:
    config: dict[str, Any] = {"notify": hook}
    with pytest.raises(ConfigError) as refused:
        refuse_secrets(config, {})
    assert "submit that URL" in str(refused.value)
    assert "xyz" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DB_PASS", "hunter2"),
        (
            "AZURE_STORAGE_CONNECTION_STRING",
            "EndpointSuffix=a;AccountKey=aHVudGVyMg==",
        ),
        ("PGSERVICE", "hunter2"),
        ("DSN", "/x;AccountKey=hunter2"),
        ("DSN", "/x?password=hunter2"),
        ("NOTE", "hunter2"),
        ("MY_AWS_REGION", "eu-west-1"),
        ("RAY_AUTH_TOKEN", "hunter2"),
    ],
)
def test_an_unknown_setting_travels_by_reference_only(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"--env {name} ") as refused:
        refuse_secrets({}, {name: text})
    assert text not in str(refused.value)
    refuse_secrets({}, {name: "/run/secrets/one"})
    refuse_secrets({}, {name: "arn:aws:secretsmanager:eu-west-1:123456789012:secret:one"})

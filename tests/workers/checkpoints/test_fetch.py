"""Checkpoints come from any URL, whole, once, and with the digest that was asked for."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import CheckpointError, StorageError
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_object
from tests.support.samples.checkpoint_samples import saved, weights
from tests.support.servers.s3 import S3Server
from workers.checkpoints import cache as checkpoint_cache
from workers.checkpoints.cache import fetch_checkpoint, fetch_file, file_sha256
from workers.local_folders import cache_folder

OPTIONS = StorageOptions()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABELFLEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return saved(tmp_path / "good.pth", {"net": weights()})


def upload(url: str, body: bytes) -> None:
    store, key = open_object(url, OPTIONS)
    store.put(key, body)


def test_local_files_are_used_where_they_are(good: Path, cache: Path) -> None:
    assert fetch_checkpoint(str(good), OPTIONS) == good
    assert fetch_checkpoint(f"file://{good}", OPTIONS, sha256=file_sha256(good).upper()) == good
    assert not cache.exists()


def test_remote_files_are_cached_by_digest(good: Path, cache: Path) -> None:
    url = "memory://fetch/cells.pth"
    upload(url, good.read_bytes())
    digest = file_sha256(good)
    path = fetch_checkpoint(url, OPTIONS)
    assert path == cache / f"{digest}.pth"
    assert path.read_bytes() == good.read_bytes()
    before = path.stat().st_mtime_ns
    assert fetch_checkpoint(url, OPTIONS, sha256=digest) == path
    assert fetch_checkpoint(url, OPTIONS) == path
    assert path.stat().st_mtime_ns == before  # neither was downloaded again
    # Known by its digest, the object itself is no longer needed.
    assert fetch_checkpoint("memory://elsewhere/cells.pth", OPTIONS, sha256=digest) == path
    assert not [p for p in cache.iterdir() if p.name.startswith(".part-")]


def test_a_replaced_object_is_fetched_again(good: Path, tmp_path: Path) -> None:
    url = "memory://replaced/cells.pth"
    upload(url, good.read_bytes())
    first = fetch_checkpoint(url, OPTIONS)
    other = saved(tmp_path / "other.pth", {"net": weights(seed=5)})
    upload(url, other.read_bytes())
    second = fetch_checkpoint(url, OPTIONS)
    assert second != first
    assert second.read_bytes() == other.read_bytes()
    with pytest.raises(CheckpointError, match="has sha256"):
        fetch_checkpoint("memory://replaced/cells.pth", OPTIONS, sha256="0" * 64)


def test_a_damaged_cache_heals(good: Path) -> None:
    url = "memory://damaged/cells.pth"
    upload(url, good.read_bytes())
    path = fetch_checkpoint(url, OPTIONS)
    for digest in (None, file_sha256(good)):
        path.write_bytes(b"rotten")
        assert fetch_checkpoint(url, OPTIONS, sha256=digest).read_bytes() == good.read_bytes()


def test_a_digest_names_a_file_of_the_cache_and_no_other(tmp_path: Path, cache: Path) -> None:
    precious = tmp_path / "precious.onnx"
    precious.write_bytes(b"mine")
    upload("memory://fetch/net.onnx", b"x")
    for sha256 in ("../../precious", str(precious.with_suffix(""))):
        with pytest.raises(CheckpointError, match="sha256"):
            fetch_file("memory://fetch/net.onnx", OPTIONS, sha256=sha256)
    assert precious.read_bytes() == b"mine"


def test_a_cache_that_everybody_may_write_is_refused(good: Path, cache: Path) -> None:
    upload("memory://fetch/cells.pth", good.read_bytes())
    fetch_checkpoint("memory://fetch/cells.pth", OPTIONS)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    with pytest.raises(CheckpointError, match="everyone may write") as caught:
        fetch_checkpoint("memory://fetch/cells.pth", OPTIONS)
    assert "LABELFLEET_CACHE" in str(caught.value.hint)


def test_what_cannot_be_fetched(good: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pth"
    empty.touch()
    for url, message in (
        (str(tmp_path / "nowhere.pth"), "there is no checkpoint at"),
        ("memory://nowhere/at/all.pth", "there is no checkpoint at"),
        (str(tmp_path), "not a checkpoint by its name"),
        (str(tmp_path / "model.onnx.zip"), "not a checkpoint by its name"),
        (str(empty), "is empty"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fetch_checkpoint(url, OPTIONS)
    with pytest.raises(CheckpointError, match="not 0000"):
        fetch_checkpoint(str(good), OPTIONS, sha256="0" * 64)


def test_files_too_large_are_refused_unread(tmp_path: Path) -> None:
    huge = tmp_path / "huge.pth"
    with huge.open("wb") as file:
        file.truncate(checkpoint_cache.MAX_CHECKPOINT_BYTES + 1)  # sparse: no disk is used
    with pytest.raises(CheckpointError, match=r"8\.0 GiB"):
        fetch_checkpoint(str(huge), OPTIONS)


def test_a_cache_that_cannot_hold_it(good: Path, cache: Path) -> None:
    upload("memory://full/cells.pth", good.read_bytes())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="LABELFLEET_CACHE"):
            fetch_checkpoint("memory://full/cells.pth", OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [p for p in cache.iterdir() if p.name.startswith(".part-")]
    assert fetch_checkpoint("memory://full/cells.pth", OPTIONS).stat().st_size > 1000


def test_a_cache_that_cannot_be_made(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload("memory://blocked/cells.pth", good.read_bytes())
    monkeypatch.setenv("LABELFLEET_CACHE", str(good))  # a file
    with pytest.raises(StorageError, match="LABELFLEET_CACHE"):
        fetch_checkpoint("memory://blocked/cells.pth", OPTIONS)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LABELFLEET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/labelfleet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/labelfleet")


_FETCH = """
import sys
from storage.objects.protocols import StorageOptions
from workers.checkpoints.cache import fetch_checkpoint
print(fetch_checkpoint(sys.argv[1], StorageOptions()))
"""


@pytest.mark.slow
def test_many_processes_at_once_from_s3(good: Path, cache: Path, moto_s3: S3Server) -> None:
    """Eight workers of one machine start together: each gets the whole file."""
    import boto3

    endpoint = moto_s3.endpoint_url
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="models")
    boto3.client("s3", endpoint_url=endpoint).upload_file(str(good), "models", "a/cells.pth")
    environment = os.environ | {"AWS_ENDPOINT_URL": endpoint}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _FETCH, "s3://models/a/cells.pth"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(6)
    ]
    answers = {process.communicate(timeout=120)[0].strip() for process in running}
    assert answers == {str(cache / f"{file_sha256(good)}.pth")}
    assert Path(answers.pop()).read_bytes() == good.read_bytes()
    assert not [p for p in cache.iterdir() if p.name.startswith(".part-")]

"""Real S3 servers for tests: moto, and SeaweedFS with credentials; on free loopback ports."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.open import open_store
from tests.support.patience import patient
from tests.support.servers.ports import free_ports

ACCESS_KEY = "labelfleet-test"
SECRET_KEY = "labelfleet-test-secret"
_READY_TIMEOUT_S = 120


def credentials_env() -> dict[str, str]:
    """Return what makes boto3 use the test credentials and nothing of the machine it runs on."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@dataclass(frozen=True)
class S3Server:
    """A running S3 server.

    Attributes:
        name: moto or weed.
        endpoint_url: http://127.0.0.1:PORT.
        access_key, secret_key: what it accepts (moto accepts anything).
        pid: of its process.
    """

    name: str
    endpoint_url: str
    pid: int
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    @property
    def options(self) -> StorageOptions:
        """To reach it; few and short retries."""
        return StorageOptions(endpoint_url=self.endpoint_url, attempts=3, read_timeout_s=20)

    def env(self) -> dict[str, str]:
        """Environment variables for a subprocess that is to use this server."""
        return {**credentials_env(), "AWS_ENDPOINT_URL": self.endpoint_url}

    def client(self) -> Any:
        """Return a plain boto3 client of its own."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def fresh_bucket(self) -> str:
        """Create an empty bucket; returns its name."""
        bucket = f"test-{uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=bucket)
        return bucket

    def fresh_store(self, prefix: str = "run") -> ObjectStore:
        """Return a store at ``prefix`` of a new bucket."""
        return open_store(f"s3://{self.fresh_bucket()}/{prefix}", self.options)


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """moto's server in a process of its own; forgets everything at the end."""
    (port,) = free_ports(1)
    command = [sys.executable, str(Path(__file__).with_name("moto_app.py")), str(port)]
    with _process(command, Path(os.devnull)) as process:
        server = S3Server("moto", f"http://127.0.0.1:{port}", process.pid)
        _wait(process, lambda: _answers(server.endpoint_url + "/moto-api/"), "moto")
        yield server


@contextmanager
def weed_server() -> Iterator[S3Server]:
    """A whole SeaweedFS (master, volume, filer, S3 gateway) in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    ports = free_ports(8)
    try:
        with _process(_weed_command(folder, ports), folder / "weed.log") as process:
            server = S3Server("weed", f"http://127.0.0.1:{ports[0]}", process.pid)
            _wait(process, lambda: _takes_objects(server), f"SeaweedFS ({folder / 'weed.log'})")
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for port in ports:  # gRPC's, outside of the folder
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _weed_command(folder: Path, ports: Sequence[int]) -> list[str]:
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "objects").mkdir()
    # Every port is named: a gRPC port left open is the plain one plus 10000.
    parts = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc"]
    parts += ["volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
    return [
        str(Path(sys.executable).with_name("weed")),
        "server",
        f"-dir={folder / 'objects'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=2000",  # every bucket takes several
        "-filer",
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        f"-s3.config={folder / 'identities.json'}",
        *(f"-{part}={port}" for part, port in zip(parts, ports, strict=True)),
    ]


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **credentials_env()},
            preexec_fn=end_with_parent,
        )
    try:
        yield process
    finally:
        # What they hold is thrown away, and SeaweedFS takes 15 s to say goodbye.
        process.kill()
        process.wait()


def end_with_parent() -> None:
    """Linux: a server must not outlive tests that were killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], name: str) -> None:
    limit = time.monotonic() + patient(_READY_TIMEOUT_S)
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode} before it was ready")
        if time.monotonic() > limit:
            raise RuntimeError(f"{name} was not ready after {_READY_TIMEOUT_S} s")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _takes_objects(server: S3Server) -> bool:
    """Store an object: the gateway answers before its volumes are ready."""
    try:
        bucket = server.fresh_bucket()
        server.client().put_object(Bucket=bucket, Key="ready", Body=b"ready")
    except (BotoCoreError, ClientError):
        return False
    return True

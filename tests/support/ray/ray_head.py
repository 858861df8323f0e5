"""A real Ray head with its job server, on loopback, with token auth; ended by its process id."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.patience import patient
from tests.support.servers.ports import quiet_ports
from tests.support.servers.s3 import end_with_parent

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class RayHead:
    """Where it answers, and what a client must know.

    Attributes:
        jobs: URL of the job server.
        token: what it wants to see.
        env: the token's variables, as a client sets them.
        folder: what Ray writes.
    """

    jobs: str
    token: str
    folder: str
    env: dict[str, str]


@contextmanager
def ray_head(environment: Mapping[str, str] | None = None) -> Iterator[RayHead]:
    """Start one with this machine's cores; ``environment`` is what its nodes have and jobs not."""
    # Short, since unix sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="lf-head-", dir="/tmp") as folder:
        token = secrets.token_hex(16)
        (path := Path(folder, "token")).write_text(token)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        ports = quiet_ports(6)
        with _started(folder, ports, {**auth, **(environment or {})}):
            head = RayHead(f"http://127.0.0.1:{ports[0]}", token, folder, auth)
            _until_ready(head)
            yield head


@contextmanager
def _started(folder: str, ports: Sequence[int], environment: Mapping[str, str]) -> Iterator[None]:
    names = (
        "--dashboard-port", "--port", "--dashboard-agent-listen-port",
        "--dashboard-agent-grpc-port", "--metrics-export-port", "--runtime-env-agent-port",
    )  # fmt: skip
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}",
        *(f"{name}={port}" for name, port in zip(names, ports, strict=True)),
        "--num-cpus=2", f"--object-store-memory={80 * 2**20}",
    ]  # fmt: skip
    own = {
        "PATH": f"{BIN}:{os.environ['PATH']}",  # where a job finds labelfleet
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback, see pipelines/cluster/ray_cluster.py
        # On a busy machine a node's agent takes longer than the half minute after which it ends.
        "RAY_agent_register_timeout_ms": "300000",
        "RAY_raylet_start_wait_time_s": "120",
    }
    log = Path(folder, "start.log")
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, start_new_session=True, preexec_fn=end_with_parent,
            env={**os.environ, **own, **environment},
        )  # fmt: skip
    try:
        yield
    except BaseException:
        sys.stderr.write(log.read_text())
        raise
    finally:
        process.send_signal(signal.SIGTERM)  # --block: it ends what it started
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _until_ready(head: RayHead) -> None:
    limit_s = time.monotonic() + patient(120)
    headers = {"Authorization": f"Bearer {head.token}"}
    while True:
        try:
            answer = httpx.get(f"{head.jobs}/api/jobs/", headers=headers, timeout=5)
            if answer.status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < limit_s, "the job server did not start"
        time.sleep(0.2)

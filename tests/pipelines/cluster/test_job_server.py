"""Which job server is meant, which token it is shown, and one that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
import yaml

from pipelines.cluster.bundle import Bundle
from pipelines.cluster.submit import (
    DEFAULT_ADDRESS,
    JobRequest,
    RayJobs,
    auth_headers,
    job_server_url,
    patient,
    refusal,
)
from storage.errors import ClusterLost, ConfigError
from tests.support.samples.tiny_run import run_fields
from tests.support.servers.ports import free_ports

COLD = (
    "Request failed with status code 500: No available agent to submit job, please try again later."
)


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://ray.example.com/", "https://ray.example.com"),
        ("head:8265", "http://head:8265"),
        ("127.0.0.1:40000", "http://127.0.0.1:40000"),
    ],
)
def test_the_address_that_is_given_is_taken(given: str, url: str) -> None:
    assert job_server_url(given) == url


@pytest.mark.parametrize("given", ["head:6379", "ray://head:10001", "auto", "head", ":8265"])
def test_an_address_without_a_job_server_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="is not a job server") as refused:
        job_server_url(given)
    assert "http://head:8265" in str(refused.value)


def test_the_environment_is_asked_as_ray_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_server_url(None) == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_ADDRESS", "http://one:8265")
    assert job_server_url(None) == "http://one:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://two:8265")
    assert job_server_url(None) == "http://two:8265"
    assert job_server_url("http://three:8265") == "http://three:8265"


def test_without_a_token_none_is_sent() -> None:
    assert auth_headers() == {}


def test_the_token_is_rays_in_rays_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("default\n")
    assert auth_headers() == {"Authorization": "Bearer default"}
    (tmp_path / "mounted").write_text("mounted\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mounted"))
    assert auth_headers() == {"Authorization": "Bearer mounted"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "direct")
    assert auth_headers() == {"Authorization": "Bearer direct"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert auth_headers() == {}


@pytest.mark.parametrize(("status", "lost"), [(502, True), (503, True), (504, True), (500, False)])
def test_a_proxy_without_a_head_behind_it_is_waited_for(status: int, lost: bool) -> None:
    # The sentence is Ray's own.
    said = RuntimeError(f"Request failed with status code {status}: <html>\nUnavailable.")
    assert isinstance(refusal("http://head:8265", said), ClusterLost) is lost


@pytest.mark.slow
def test_a_cluster_whose_agent_is_not_up_yet_is_waited_for() -> None:
    """As the job server of a cold or busy cluster says it, with status 500."""
    pauses: list[float] = []
    answers = iter([RuntimeError(COLD)] * 12)

    def ask() -> str:
        for answer in answers:
            raise answer
        return "submitted"

    assert patient(pauses.append)(ask) == "submitted"
    assert len(pauses) == 12

    def never() -> str:
        raise RuntimeError(COLD)

    with pytest.raises(RuntimeError, match="No available agent"):
        patient(pauses.append)(never)
    assert 300 < sum(pauses) < 700


def test_a_refusal_is_not_asked_again() -> None:
    asked: list[int] = []

    def refuse() -> None:
        asked.append(1)
        raise RuntimeError("Request failed with status code 400: no")

    with pytest.raises(RuntimeError):
        patient(lambda s: None)(refuse)
    assert asked == [1]


@pytest.mark.slow
def test_a_job_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "cells.yaml"
    (tmp_path / "cells.pth").write_text("weights")
    config.write_text(yaml.safe_dump(run_fields("s3://plates/in", "s3://plates/out",
                                                tmp_path / "cells.pth")))  # fmt: skip
    [port] = free_ports(1)
    done = subprocess.run(
        [Path(sys.executable).with_name("labelfleet"), "submit", config, "--address", f"http://127.0.0.1:{port}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first == f"error: no job server answers at http://127.0.0.1:{port}"
    assert "ray dashboard" in " ".join(rest)
    assert "Traceback" not in done.stderr


class _BusyHead(BaseHTTPRequestHandler):
    """Answers as Ray's job server does, but drops the first two questions about jobs."""

    dropped = 0

    def do_GET(self) -> None:
        if self.path.startswith("/api/jobs") and _BusyHead.dropped < 2:
            _BusyHead.dropped += 1
            self.close_connection = True
            return
        about = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
        body = json.dumps([] if self.path.startswith("/api/jobs") else about).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.mark.slow
def test_a_head_that_drops_connections_is_asked_again() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _BusyHead) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        bundle = cast(Bundle, None)  # nothing is started
        jobs = RayJobs(f"http://127.0.0.1:{server.server_port}", JobRequest(bundle))
        assert jobs.jobs() == []
        server.shutdown()
    assert _BusyHead.dropped == 2

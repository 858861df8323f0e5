"""Spot notices, asked of a real metadata endpoint on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.patience import patient
from tests.support.servers.metadata import MetadataServer, metadata_server
from workers.actors.spot import EC2_METADATA_URL, SpotNotice, SpotWatch, metadata_url

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC).timestamp()


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with metadata_server() as running:
        yield running


@pytest.fixture
def watch(server: MetadataServer) -> Iterator[SpotWatch]:
    made = SpotWatch(server.url, poll_s=0.01, wall=lambda: NOW)
    yield made
    made.close()


def until(true: Callable[[], object]) -> None:
    limit = time.monotonic() + patient(20)
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_a_notice_is_seen_with_the_seconds_that_are_left(
    server: MetadataServer, watch: SpotWatch
) -> None:
    until(lambda: ("GET", 404) in server.asked)
    assert watch.notice is None
    server.notice = '{"action": "terminate", "time": "2026-05-01T12:01:50Z"}'
    until(lambda: watch.notice)
    assert watch.notice == SpotNotice("terminate", 110.0)
    assert [asked for asked in server.asked if asked[0] == "PUT"] == [("PUT", 200)]


@pytest.mark.parametrize(
    ("time_of_it", "within_s"),
    [
        ("2026-05-01T11:00:00Z", 0.0),
        ("2026-05-02T12:00:00Z", 120.0),  # one of the two clocks is a day off
        ("soon", 120.0),
    ],
)
def test_a_clock_that_is_off_makes_no_notice_harmless(
    server: MetadataServer, watch: SpotWatch, time_of_it: str, within_s: float
) -> None:
    server.notice = f'{{"action": "stop", "time": "{time_of_it}"}}'
    until(lambda: watch.notice)
    assert watch.notice == SpotNotice("stop", within_s)


def test_an_expired_token_is_renewed(server: MetadataServer) -> None:
    server.valid = 2
    watch = SpotWatch(server.url, poll_s=0.01, wall=lambda: NOW)
    until(lambda: server.asked.count(("PUT", 200)) >= 3)
    server.notice = '{"action": "terminate", "time": "2026-05-01T12:02:00Z"}'
    until(lambda: watch.notice)
    watch.close()


def test_nonsense_is_not_a_notice(server: MetadataServer, watch: SpotWatch) -> None:
    server.notice = "<html>captive portal</html>"
    until(lambda: ("GET", 200) in server.asked)
    assert watch.notice is None


def test_elsewhere_than_on_ec2_no_thread_runs(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # of which some may end meanwhile
    watch = SpotWatch(metadata_url({}, tmp_path))
    assert set(threading.enumerate()) <= before
    assert watch.notice is None


def test_where_the_service_is(tmp_path: Path) -> None:
    assert metadata_url({}, tmp_path) == ""
    (tmp_path / "sys_vendor").write_text("QEMU\n")
    assert metadata_url({}, tmp_path) == ""
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    assert metadata_url({}, tmp_path) == EC2_METADATA_URL
    assert metadata_url({"AWS_EC2_METADATA_DISABLED": "true"}, tmp_path) == ""
    named = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338/"}
    assert metadata_url(named, tmp_path) == "http://127.0.0.1:1338"

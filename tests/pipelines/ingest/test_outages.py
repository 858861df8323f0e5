"""ingest LIST when servers fail: an outage costs no image, and nothing waits for ever."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from pipelines.ingest.ingest import IngestSummary, ingest
from storage.errors import StorageUnavailable, TooLarge
from storage.objects.protocols import StorageOptions
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source, tar_shards
from storage.stores.open import open_store
from storage.stores.web_get import WebGet
from tests.support.patience import patient

ONCE = StorageOptions(attempts=1)


class Server(http.server.BaseHTTPRequestHandler):
    """Gives the path as the body; numbers in ``down`` get 503 or 429, those in ``stumbling`` once
    only, some paths misbehave."""

    down: ClassVar[set[int]] = set()
    stumbling: ClassVar[set[int]] = set()
    asked: ClassVar[Counter[str]] = Counter()
    over: ClassVar[threading.Event] = threading.Event()
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep test output clean."""

    def do_HEAD(self) -> None:
        self.asked[f"HEAD {self.path}"] += 1
        self.send_error(405)

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path.startswith("/silent.jpg"):
            self.over.wait(60)
            self.close_connection = True
            return
        if self.path == "/endless.jpg":
            self.send_response(200)
            self.end_headers()
            for _ in range(4096):
                self.wfile.write(bytes(1 << 16))
            return
        number = int("".join(filter(str.isdigit, self.path)))
        body = b"" if number in self.down | self.stumbling else self.path.encode()
        self.stumbling.discard(number)
        self.send_response(200 if body else (503, 429)[number % 2])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def address() -> Iterator[str]:
    Server.down, Server.stumbling, Server.asked = set(), set(), Counter()
    Server.over = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Server.over.set()
        server.shutdown()


def packed(tmp_path: Path, urls: list[str], **options: bool) -> IngestSummary:
    (tmp_path / "list.txt").write_text("\n".join(urls))
    source, dest = str(tmp_path / "list.txt"), str(tmp_path / "out")
    return ingest(source, dest, options=ONCE, images_per_shard=10, **options)  # type: ignore[arg-type]


def bodies(tmp_path: Path) -> Counter[bytes | None]:
    store = open_store(str(tmp_path / "out"))
    return Counter(
        record.data
        for shard in tar_shards(list_source(store))
        for record in read_shard(store, shard, max_image_bytes=1 << 20)
    )


@pytest.mark.slow
def test_an_outage_in_the_middle_of_a_list_loses_nothing(address: str, tmp_path: Path) -> None:
    urls = [f"{address}/{n}.jpg" for n in range(100)]
    Server.down = set(range(20, 100))
    with pytest.raises(StorageUnavailable, match=r"20 entries .* in a row cannot be fetched"):
        packed(tmp_path, urls)
    Server.down = set()
    summary = packed(tmp_path, urls)
    assert (summary.images, summary.errors, summary.exit_code) == (100, 0, 0)
    assert bodies(tmp_path) == Counter(f"/{n}.jpg".encode() for n in range(100))


def test_a_few_urls_that_fail_are_tried_again_by_the_next_call(
    address: str, tmp_path: Path
) -> None:
    urls = [f"{address}/{n}.jpg" for n in range(30)]
    Server.down = {3, 4, 17}
    first = packed(tmp_path, urls)
    assert (first.images, first.errors, first.exit_code) == (27, 3, 3)
    Server.down = {4}
    second = packed(tmp_path, urls)
    assert (second.images, second.errors, second.shards) == (29, 1, first.shards + 1)
    Server.down = set()
    assert packed(tmp_path, urls).images == 30
    assert bodies(tmp_path) == Counter(f"/{n}.jpg".encode() for n in range(30))


def test_a_host_that_is_gone_for_good_can_be_set_aside(address: str, tmp_path: Path) -> None:
    urls = [f"{address}/{n}.jpg" for n in range(60)]
    Server.down = set(range(10, 50))
    summary = packed(tmp_path, urls, skip_unreachable=True)
    assert (summary.images, summary.errors, summary.exit_code) == (20, 40, 3)
    Server.down = set()
    assert packed(tmp_path, urls).images == 60


def test_a_list_of_which_no_server_answers_records_nothing(address: str, tmp_path: Path) -> None:
    Server.down = set(range(5))
    with pytest.raises(StorageUnavailable):
        packed(tmp_path, [f"{address}/{n}.jpg" for n in range(5)])
    assert not list((tmp_path / "out").glob("list.ingest/0*.json"))


def test_an_image_costs_one_request(address: str, tmp_path: Path) -> None:
    packed(tmp_path, [f"{address}/{n}.jpg" for n in range(12)])
    assert Server.asked == Counter({f"/{n}.jpg": 1 for n in range(12)})


def test_a_url_that_never_answers_or_never_ends_is_given_up(address: str) -> None:
    began_s = time.monotonic()
    with pytest.raises(StorageUnavailable):
        WebGet(1, idle_s=0.5).get(f"{address}/silent.jpg", 1 << 20)
    assert time.monotonic() - began_s < 30
    with pytest.raises(TooLarge, match="the limit is 1048576"):
        WebGet(1).get(f"{address}/endless.jpg", 1 << 20)
    with pytest.raises(StorageUnavailable):
        WebGet(1, total_s=0.001).get(f"{address}/endless.jpg", 1 << 40)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_ingest_whose_server_never_answers(
    address: str, tmp_path: Path, number: signal.Signals
) -> None:
    urls = [f"{address}/1.jpg", *[f"{address}/silent.jpg?{n}" for n in range(20)]]
    (tmp_path / "list.txt").write_text("\n".join(urls))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli.main", "ingest", "list.txt", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        # Tests in the background of a shell ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        began_s = time.monotonic()
        while not any(path.startswith("/silent") for path in Server.asked):
            assert time.monotonic() - began_s < patient(60)
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        began_s = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=patient(60))
        assert time.monotonic() - began_s < patient(15)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "run the same command to continue" in " ".join(err.split())


@pytest.mark.slow
def test_a_server_that_stumbles_once_is_asked_again(address: str) -> None:
    Server.stumbling = {8}
    assert WebGet(8).get(f"{address}/8.jpg", 100) == b"/8.jpg"
    assert Server.asked["/8.jpg"] == 2

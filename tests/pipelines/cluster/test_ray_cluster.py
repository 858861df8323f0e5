"""A local Ray: private to this machine, gone afterwards; and a cluster that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from pipelines.cluster.local_ray import start_patiently
from pipelines.cluster.ray_cluster import ray_cluster
from storage.errors import ConfigError, RayLost, WorkerLost
from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[3]

LISTENING = """
import os, sys
from pathlib import Path
import ray
from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.cluster.nodes import cluster_nodes

def listening():
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                found.add((fields[1], fields[9]))
    return found

def inodes(pid):
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.readlink(fd)
        except OSError:
            pass

def descendants(pid):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            child = int(stat.parent.name)
            yield child
            yield from descendants(child)

with ray_cluster(None):
    @ray.remote
    def one():
        return 1
    assert ray.get(one.remote()) == 1
    assert cluster_nodes()[0].cpus >= 1
    mine = {f"socket:[{inode}]": address for address, inode in listening()}
    for pid in [os.getpid(), *descendants(os.getpid())]:
        for link in inodes(pid):
            if link in mine:
                print(mine[link].rpartition(":")[0])
"""

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
def test_a_local_ray_listens_on_loopback_only(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        capture_output=True,
        text=True,
        check=False,
        timeout=patient(200),
    )
    assert done.returncode == 0, done.stderr
    bound = done.stdout.split()
    assert len(bound) >= 5, "the sockets of Ray's processes were not found"
    assert set(bound) <= LOOPBACK


KILLED = """
import logging, os, signal, sys, time
import ray
from pipelines.cluster.ray_cluster import ray_cluster

class Last(logging.Handler):
    said = ""

    def emit(self, record):
        self.said += record.getMessage()

last = Last()
logging.getLogger("labelfleet").addHandler(last)
logging.getLogger("labelfleet").setLevel(logging.INFO)

@ray.remote
class Standing:
    def pid(self):
        return os.getpid()

    def stand(self):
        time.sleep(600)

with ray_cluster(None):
    actor = Standing.remote()
    pid = ray.get(actor.pid.remote())
    standing = actor.stand.remote()
    os.kill(pid, signal.SIGKILL)
    try:
        ray.get(standing)
    except ray.exceptions.RayActorError:
        pass
    until = time.monotonic() + float(sys.argv[1])
    while not last.said and time.monotonic() < until:
        time.sleep(0.1)
assert "Ray reports: " in last.said and "died" in last.said, last.said
"""


@pytest.mark.slow
def test_what_ray_reports_of_a_dead_worker_is_logged_and_not_printed() -> None:
    """The stdout of a command is its result; a notebook's is its own."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(patient(60))], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=patient(300),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


OWN = """
import ray
from pipelines.cluster.ray_cluster import ray_cluster
from storage.errors import ConfigError

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote
class Own:
    def answer(self):
        return 42

own = Own.remote()
for address in (None, "local", ray.get_runtime_context().gcs_address):
    try:
        with ray_cluster(address):
            raise AssertionError("opened")
    except ConfigError as exc:
        print(exc.hint)
    assert ray.get(own.answer.remote()) == 42
ray.shutdown()
with ray_cluster(None):
    print(ray.get(ray.remote(lambda: 1).remote()))
"""


@pytest.mark.slow
def test_a_programs_own_ray_is_left_as_it_is() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", OWN], capture_output=True, text=True, check=False,
        env=environment, timeout=patient(300),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *hints, ran = done.stdout.splitlines()
    assert hints == ["call `ray.shutdown()` first, or label in another process"] * 3
    assert ran == "1"


MODES = """
import os, signal, stat, sys, time
from pathlib import Path
import ray
from pipelines.cluster.ray_cluster import ray_cluster

handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
with ray_cluster(None):
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    ours = next(p for p in session.parents if p.parent == Path("/tmp"))
    print("mode", oct(stat.S_IMODE(ours.stat().st_mode)), ours.stat().st_uid == os.getuid())
    print("token", oct(stat.S_IMODE(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode)))
print("gone", not ours.exists())
"""


STOPPED = """
import os, signal, time
import ray
from pipelines.cluster.ray_cluster import ray_cluster

with ray_cluster(None):
    node = ray._private.worker._global_node
    raylet = node.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    began_s = time.monotonic()
print("ended", time.monotonic() - began_s < 120)
"""


@pytest.mark.slow
def test_while_a_run_is_going_no_other_user_may_enter_rays_folder(tmp_path: Path) -> None:
    """Nor is there a home folder to put a token into."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", MODES], capture_output=True, text=True, check=False,
        env=environment, timeout=patient(560),
    )  # fmt: skip
    assert done.stdout.splitlines() == ["mode 0o700 True", "token 0o600", "gone True"], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_raylet_that_stands_still_does_not_keep_the_driver(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=patient(560),
    )  # fmt: skip
    assert done.stdout == "ended True\n", done.stderr
    assert done.returncode == 0
    assert "left to itself" in done.stderr


def test_a_ray_that_does_not_start_is_tried_again_and_the_last_error_is_told() -> None:
    tried: list[int] = []
    pauses: list[float] = []

    def third_time() -> None:
        tried.append(1)
        if len(tried) < 3:
            raise Exception("The current node timed out during startup.\nMore of it")

    start_patiently(third_time, sleep=pauses.append)
    assert len(tried) == 3
    assert pauses == sorted(pauses)
    assert pauses[0] > 0

    def never() -> None:
        raise Exception("The current node timed out during startup.\nMore of it")

    with pytest.raises(RayLost, match=r"machine: The current node timed out during startup\."):
        start_patiently(never, sleep=pauses.append, within_s=0)


def test_ray_prints_no_page_of_traceback_for_a_call_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead worker fails every call that it had; the pool hears of each, and says it in a line."""
    from ray._private.worker import Worker

    class Failed(Worker):
        def deserialize_objects(self, *_: object) -> list[Exception]:
            return [RayTaskError("label", "Traceback: …", WorkerLost("a.tar"))]

    monkeypatch.delenv("RAY_IGNORE_UNHANDLED_ERRORS", raising=False)
    failed = object.__new__(Failed)
    with caplog.at_level("ERROR"):
        failed.raise_errors([], [])
        assert "Unhandled error" in caplog.text  # what Ray does by itself
        caplog.clear()
        monkeypatch.setattr("pipelines.cluster.ray_cluster.local_ray", nullcontext)
        with ray_cluster(None):
            failed.raise_errors([], [])
    assert caplog.text == ""


def test_what_time_does_not_change_is_told_at_once() -> None:
    tried: list[int] = []

    def full() -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(RayLost, match="No space left"):
        start_patiently(full)
    assert tried == [1]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_while_ray_starts_is_no_failed_start(stop: type[BaseException]) -> None:
    tried = []

    def stopped() -> None:
        tried.append(1)
        raise stop

    with pytest.raises(stop):
        start_patiently(stopped, sleep=lambda _: None)
    assert tried == [1]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line() -> None:
    with (
        pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1"),
        ray_cluster("127.0.0.1:1"),
    ):
        pass


TWO_NODES = """
import sys
import ray
from ray.cluster_utils import Cluster
from pipelines.cluster.shared_folders import _nodes_without, check_shared_folders
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
)
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
nodes = [node for node in ray.nodes() if node["Alive"]]
assert len(nodes) == 2
check_shared_folders("s3://bucket/source", f"file://{sys.argv[1]}")
check_shared_folders(f"file://{sys.argv[1]}", "s3://bucket/output")
print(len(_nodes_without(sys.argv[1] + "/not-there", nodes)), "cannot see it")
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_folder_is_refused_where_a_node_does_not_see_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=patient(250),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 cannot see it" in done.stdout  # both nodes have this machine's address
    assert list(tmp_path.iterdir()) == []

"""`ray up ray_cluster.yaml` for real, on machines that are folders, and a run submitted to it.

All that is replaced is what AWS provides (machines, ssh) and the ports: the commands, mounts,
checks and options are the file's.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipelines.demo.digits import make_pages
from tests.e2e.jobs import LABELFLEET, Job, wait_until
from tests.support.patience import patient
from tests.support.servers.ports import quiet_ports

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="orphans are found by a Linux call"),
]

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
PAGES = 8


@dataclass(frozen=True)
class Cluster:
    """One that is up.

    Attributes:
        folder: laptop/ (where `ray up` ran), and a home a node.
        jobs: URL of the job server.
        env: what a client has: the token.
    """

    folder: Path
    jobs: str
    env: dict[str, str]

    def nodes(self) -> dict[str, Any]:
        with (self.folder / "nodes.json").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # the autoscaler writes it anew all the time
            found = json.load(file)
        assert isinstance(found, dict)
        return found

    def log(self, node: str) -> str:
        return (self.folder / node / "commands.log").read_text()


@contextmanager
def ending_descendants() -> Iterator[None]:
    """Daemons that are started in between become children of this process, and are ended by pid."""
    set_child_subreaper = 36
    before = set(descendants(os.getpid()))
    ctypes.CDLL(None).prctl(set_child_subreaper, 1)
    try:
        yield
    finally:
        for _ in range(5):  # what a dying one starts is found in the next round
            for pid in set(descendants(os.getpid())) - before:
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError):
                    pass
        ctypes.CDLL(None).prctl(set_child_subreaper, 0)


def descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in map(int, found):
            yield child
            yield from descendants(child)


def installed_stamp() -> str:
    """What the setup command compares: the sum over this checkout."""
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    [install] = [c for c in config["setup_commands"] if "sha256sum" in c]
    pipeline = install.split(";")[1].split(">")[0]
    done = subprocess.run(
        ["bash", "-c", pipeline], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def here(folder: Path, ports: list[int]) -> dict[str, Any]:
    """ray_cluster.yaml with machines of this machine; and without `ray stop`, which ends every Ray
    that it finds here."""
    gcs, dashboard, *own = map(str, ports)
    config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        stop, start = config[commands]
        assert stop == "~/labelfleet/.venv/bin/ray stop"
        config[commands] = [start]
    config["provider"] = {
        "type": "external",
        "module": "tests.support.ray.subprocess_nodes.SubprocessNodes",
        "folder": str(folder),
        "image": str(BIN.parent),
        "installed": installed_stamp(),
        "use_internal_ips": True,
        # Ray's sockets lie below it; and it looks every 5 s whether a worker is wanted.
        # A busy machine takes its time.
        "environment": {
            "RAY_TMPDIR": str(folder),
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_raylet_start_wait_time_s": "60",
        },
        "rewrite": {
            "6379": {"*": gcs},
            "=8265": {"*": f"={dashboard} --ray-client-server-port={own[6]}"},
            "=8076": {"node-0": f"={own[0]}", "*": f"={own[1]}"},
            "=8080": {
                "node-0": f"={own[2]} --dashboard-agent-listen-port={own[3]}",
                "*": f"={own[4]} --dashboard-agent-listen-port={own[5]}",
            },
            "RAY_TMPDIR=/tmp": {"*": f"RAY_TMPDIR={folder}"},
        },
    }
    for kind in config["available_node_types"].values():
        kind["node_config"] = {}
        kind["resources"].pop("GPU", None)  # there is none here to look at
    return config


def logs(folder: Path) -> str:
    """What Ray's own processes wrote, for a failure: each beginning, where it breaks, and end."""
    found = sorted(folder.glob("ray/session_2*/logs/*.*"))
    texts = {path.name: path.read_text(errors="replace") for path in found}
    return "\n".join(f"== {name}\n{t[:600]}\n...\n{t[-900:]}" for name, t in texts.items() if t)


def up(folder: Path) -> tuple[Cluster, subprocess.CompletedProcess[str]]:
    """`ray up`, from a "laptop" that has the token."""
    ports = quiet_ports(9)
    laptop = folder / "laptop"
    (laptop / ".ray").mkdir(parents=True)
    token = laptop / ".ray/auth_token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    (laptop / "cluster.yaml").write_text(yaml.safe_dump(here(folder, ports)))
    environment = {
        **os.environ, "HOME": str(laptop), "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": str(laptop),
    }  # fmt: skip
    done = subprocess.run(
        [BIN / "ray", "up", "--yes", "--no-config-cache", laptop / "cluster.yaml"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=patient(250),
    )  # fmt: skip
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return Cluster(folder, f"http://127.0.0.1:{ports[1]}", client), done


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Twice, since a raylet gives its agent 15 s to start and dies of it on a machine that does
    # much else besides.
    for last in (False, True):
        place = tempfile.TemporaryDirectory(
            prefix="lf-up-",
            dir="/tmp",
            ignore_cleanup_errors=True,  # short: sockets lie below it
        )
        with place as folder, ending_descendants():
            found, done = up(Path(folder))
            if done.returncode == 0:
                yield found
                return
            assert not last, done.stdout + done.stderr + logs(Path(folder))


def test_the_head_is_up_behind_the_token_on_loopback_without_a_core(cluster: Cluster) -> None:
    assert list(cluster.nodes()) == ["node-0"], "a worker came before anybody asked for one"
    assert httpx.get(f"{cluster.jobs}/api/jobs/", timeout=30).status_code == 401
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}

    def answers(path: str) -> httpx.Response:
        return httpx.get(f"{cluster.jobs}/api/{path}", headers=headers, timeout=30)

    # `ray up` is back before every part of the dashboard answers.
    wait_until(lambda: answers("jobs/").status_code == answers("v0/nodes").status_code == 200)
    assert answers("jobs/").json() == []
    port = int(cluster.jobs.rpartition(":")[2])
    listening = {
        line.split()[1].partition(":")[0]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].partition(":")[2], 16) == port
    }
    assert listening == {"0100007F"}
    [head] = answers("v0/nodes").json()["data"]["result"]["result"]
    assert "CPU" not in head["resources_total"]


def test_a_submitted_run_brings_a_worker_which_labels_everything(
    cluster: Cluster, tmp_path: Path
) -> None:
    make_pages(tmp_path / "pages", images=PAGES, seed=3, broken=False)
    workers = {"count": 1, "gpus": 0, "cpus": 2}
    job = Job(
        tmp_path, str(tmp_path / "pages/images"), str(tmp_path / "run"), fields={"workers": workers}
    )  # fmt: skip
    done = subprocess.run(
        [LABELFLEET, "submit", job.config(), "--address", cluster.jobs, "--json"],
        env={**os.environ, **cluster.env}, capture_output=True, text=True, check=False,
        timeout=patient(280),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "SUCCEEDED"
    assert len(job.rows()) == PAGES
    worker = cluster.nodes()["node-1"]
    assert worker["tags"]["ray-user-node-type"] == "gpu"
    log = cluster.log("node-1")
    assert "assert found == ('2.60.0', '0.1.0')" in log
    cache = cluster.folder / "node-1/.cache"
    assert (cache / "spool").is_dir()


def test_nothing_was_installed_and_no_secret_but_the_token_is_on_a_node(cluster: Cluster) -> None:
    """The image had this very checkout: the stamp agreed, on the head and on the worker."""
    for node in ("node-0", "node-1"):
        home = cluster.folder / node
        installed = (home / "labelfleet/.venv/.installed").read_text()
        assert (home / "labelfleet/.wanted").read_text() == installed
        assert (home / "labelfleet/.venv/bin").is_symlink(), "the environment was made anew"
        assert (home / ".ray/auth_token").stat().st_mode & 0o077 == 0
        assert not (home / ".aws").exists()
        assert not list(home.glob("labelfleet/**/__pycache__"))

"""Ray itself is killed under a run: the driver says so in one line, and the run continues."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Job, wait_until

from pipelines.digits import make_pages

pytestmark = pytest.mark.slow

PAGES = 240  # more than a worker labels while nobody has noticed yet
# Ray itself waits for minutes; ours follows its patience.
QUICK = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "16",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "2",
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_pages(folder, images=PAGES, seed=8, broken=False)
    return folder / "images"


def descendants(pid: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            yield int(stat.parent.name)
            yield from descendants(int(stat.parent.name))


def kill_ray(driver: subprocess.Popen[str], name: str) -> None:
    """SIGKILL a part of the driver's own Ray."""
    for pid in descendants(driver.pid):
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(f"/{name}".encode()):
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError(f"no {name} below {driver.pid}")


def commits(job: Job) -> int:
    folder = Path(job.output) / "annotations"
    return len(list(folder.glob("*.parquet"))) if folder.is_dir() else 0


def test_without_its_raylet_or_its_head_a_run_ends_in_words_and_the_next_one_continues(
    pages: Path, tmp_path: Path
) -> None:
    # Small shards and one slow worker, so that the kill comes in the middle.
    fields = {
        "source": {"url": str(pages), "shard_size": 2},
        "workers": {"count": 1, "depth": 1, "cpus": 1},
    }
    job = Job(tmp_path, str(pages), str(tmp_path / "run"), env=QUICK, fields=fields)
    there = [0]
    for part, says in (("raylet", "raylet"), ("gcs_server", "head has not answered")):
        with job.started() as driver:
            wait_until(lambda: commits(job) > there[-1] or driver.poll() is not None)
            os.kill(driver.pid, signal.SIGSTOP)  # else it is done before the kill
            kill_ray(driver, part)
            os.kill(driver.pid, signal.SIGCONT)
            out, err = driver.communicate(timeout=150)
        assert driver.returncode == 1, err
        assert says in out
        assert "Traceback" not in err
        there.append(commits(job))
        assert there[-2] < there[-1] < PAGES // 2, "the kill came too late to show anything"
    code, summary, err = job.run()
    assert code == 0, err
    assert summary["images"] == len(job.rows()) == PAGES
    assert summary["quarantined"] == 0

"""Ray itself is killed under a run: the driver says so in one line, and the run continues."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipelines.demo.digits import make_pages
from tests.e2e.jobs import SLOW_MODEL, SLOW_WORKERS, Job, wait_until

pytestmark = pytest.mark.slow

PAGES = 192
# Ray itself waits for a minute; ours follows its patience.
QUICK = {"RAY_gcs_rpc_server_reconnect_timeout_s": "40"}


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


def named(driver: subprocess.Popen[str], name: str) -> int:
    """The pid of a part of the driver's own Ray."""
    for pid in descendants(driver.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        if command.endswith(f"/{name}") or command.startswith(name):
            return pid
    raise AssertionError(f"no {name} below {driver.pid}")


@contextmanager
def killed(driver: subprocess.Popen[str], part: str) -> Iterator[None]:
    """SIGKILL a part of Ray, in a run that cannot end: its worker stands still from here on."""
    os.kill(driver.pid, signal.SIGSTOP)
    worker = named(driver, "ray::LabelActor")
    os.kill(worker, signal.SIGSTOP)
    os.kill(named(driver, part), signal.SIGKILL)
    os.kill(driver.pid, signal.SIGCONT)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def commits(job: Job) -> int:
    folder = Path(job.output) / "annotations"
    return len(list(folder.glob("*.parquet"))) if folder.is_dir() else 0


@pytest.mark.timeout(600)
def test_without_its_raylet_or_its_head_a_run_ends_in_words_and_the_next_one_continues(
    pages: Path, tmp_path: Path
) -> None:
    fields = {
        "source": {"url": str(pages), "shard_size": 2},
        "model": SLOW_MODEL,
        "workers": {**SLOW_WORKERS, "depth": 1},
    }
    job = Job(tmp_path, str(pages), str(tmp_path / "run"), env=QUICK, fields=fields)
    there = [0]
    for part, says in (("raylet", "raylet"), ("gcs_server", "head has not answered")):
        with job.started() as driver:
            wait_until(lambda: commits(job) > there[-1] or driver.poll() is not None)
            assert driver.poll() is None, driver.communicate()
            with killed(driver, part):
                out, err = driver.communicate(timeout=120)
        assert driver.returncode == 1, err
        assert says in out
        assert "Traceback" not in err
        there.append(commits(job))
        assert there[-2] < there[-1] < PAGES // 2
    code, summary, err = job.run()
    assert code == 0, err
    assert summary["images"] == len(job.rows()) == PAGES
    assert summary["quarantined"] == 0

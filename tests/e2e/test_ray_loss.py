"""Ray itself is killed under a run: the driver says so in one line, and the run continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipelines.demo.digits import make_pages
from tests.e2e.jobs import SLOW_MODEL, SLOW_WORKERS, Job, wait_until
from tests.e2e.ray_parts import named
from tests.support.patience import patient
from tests.support.samples.tiny_run import fill_folder, run_fields

pytestmark = pytest.mark.slow

PAGES = 192
# Ray itself waits for a minute; ours follows its patience.
QUICK = {"RAY_gcs_rpc_server_reconnect_timeout_s": "40"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_pages(folder, images=PAGES, seed=8, broken=False)
    return folder / "images"


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@contextmanager
def killed(driver: subprocess.Popen[str], part: str) -> Iterator[None]:
    """SIGKILL a part of Ray, in a run that cannot end: its worker stands still from here on."""
    os.kill(driver.pid, signal.SIGSTOP)
    worker = named(driver, "ray::LabelActor")
    os.kill(worker, signal.SIGSTOP)
    gone = named(driver, part)
    os.kill(gone, signal.SIGKILL)
    wait_until(lambda: has_ended(gone))
    # The kernel sends SIGHUP and SIGCONT to stopped processes that a dead raylet leaves behind;
    # under nohup they survive and go on, so the worker is stopped again.
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGSTOP)
    os.kill(driver.pid, signal.SIGCONT)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


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
            job.has_committed(driver, there[-1] + 1)
            assert driver.poll() is None, driver.communicate()
            with killed(driver, part):
                out, err = driver.communicate(timeout=patient(120))
        assert driver.returncode == 1, err
        assert says in out
        assert "Traceback" not in err
        there.append(job.commits())
        assert there[-2] < there[-1] < PAGES // 2
    code, summary, err = job.run()
    assert code == 0, err
    assert summary["images"] == len(job.rows()) == PAGES
    assert summary["quarantined"] == 0


LOCK_FIRST = """
import json, os, signal, sys, threading, time
from pathlib import Path

import ray

from pipelines import label_run, load_config
from pipelines.dispatch.tally import Caller, Unwatched

config = load_config(sys.argv[1])
lock = Path(config.output) / "lock.json"
gone = []


class Stops(Unwatched):
    def update(self, tally):
        if tally.shards == tally.total and not gone:
            node = ray._private.worker._global_node
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGSTOP)
            threading.Thread(target=watch, daemon=True).start()


def watch():
    while lock.exists():
        time.sleep(0.1)
    gone.append(time.monotonic())


summary = label_run(config, caller=Caller(Stops()))
print(json.dumps([summary.images, summary.exit_code, time.monotonic() - gone[0]]))
"""


def test_the_lock_is_released_before_a_ray_that_hangs_is_ended(
    tmp_path: Path, nano_checkpoint: Path
) -> None:
    fill_folder(tmp_path / "in", 4)
    fields = run_fields(tmp_path / "in", tmp_path / "out", nano_checkpoint, workers={"count": 1})
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    done = subprocess.run(
        [sys.executable, "-c", LOCK_FIRST, tmp_path / "run.yaml"], capture_output=True, text=True,
        check=False, timeout=patient(560), cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    images, code, before_s = json.loads(done.stdout)
    assert (images, code) == (4, 0)
    assert before_s > 20, "Ray's end, which takes 30 s here, came first"

"""Ctrl-C once and twice, a full disk, two drivers at once: readable, resumable, nothing doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.demo.digits import make_pages
from tests.e2e.jobs import SLOW_MODEL, SLOW_WORKERS, Job
from tests.e2e.ray_parts import named
from tests.support.patience import patient

pytestmark = pytest.mark.slow

PAGES = 192


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_pages(folder, images=PAGES, seed=6, broken=False)
    return folder / "images"


def test_ctrl_c_lets_shards_in_flight_finish_and_the_next_run_continues(
    pages: Path, tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    fields = {"model": SLOW_MODEL, "workers": {**SLOW_WORKERS, "depth": 2}}
    job = Job(tmp_path, str(pages), str(tmp_path / "run"), fields=fields)
    with job.started() as driver:
        job.has_committed(driver, 1)
        assert driver.poll() is None, driver.communicate()
        driver.send_signal(signal.SIGSTOP)  # or it would be done before anybody has looked
        seen = status_from_elsewhere(job, tmp_path)
        driver.send_signal(signal.SIGINT)
        driver.send_signal(signal.SIGCONT)
        out, err = driver.communicate(timeout=patient(200))
    assert seen["invocation"]["state"] == "running"
    assert 1 <= seen["committed"] <= seen["listed"] == PAGES // 8
    assert driver.returncode == 130, err
    assert "Traceback" not in err
    assert '"outcome": "stopped"' in out
    assert 1 <= job.commits() < PAGES // 8
    # A second driver finds the lock free, and the counts add up.
    left = PAGES // 8 - job.commits()
    code, summary, err = replace(job, env={**shared_ray, "LABELFLEET_LOG": "json"}).run()
    assert code == 0, err
    assert summary["images"] == len(job.rows()) == PAGES
    lines = [json.loads(line) for line in err.splitlines()]  # every line of its log is one object
    done = [line for line in lines if line["message"].startswith("committed")]
    assert len({line["shard"] for line in done}) == len(done) == left
    assert {line["run"] for line in done} == {"digits"}
    assert all(line["attempt"].startswith(line["invocation"]) for line in done)


def status_from_elsewhere(job: Job, tmp_path: Path) -> dict[str, Any]:
    """`labelfleet status` in a process that knows the output's URL, and has no Ray at all."""
    (tmp_path / "other-home").mkdir()
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from pipelines.cli.main import main; main(sys.argv[1:])"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code, "status", job.output, "--json"],
        env={**variables, "HOME": str(tmp_path / "other-home")}, cwd=tmp_path,
        capture_output=True, text=True, timeout=patient(120), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert isinstance(seen, dict)
    return seen


def test_ctrl_c_twice_stops_at_once(pages: Path, tmp_path: Path) -> None:
    fields = {"model": SLOW_MODEL, "workers": {**SLOW_WORKERS, "depth": 12}}
    job = Job(tmp_path, str(pages), str(tmp_path / "run"), fields=fields)
    with job.started() as driver:
        assert driver.stderr is not None
        job.has_committed(driver, 1)
        worker = named(driver, "ray::LabelActor")
        os.kill(worker, signal.SIGSTOP)  # what is in flight would be done before the second one
        try:
            driver.send_signal(signal.SIGINT)
            said = iter(driver.stderr.readline, "")
            heard = next(line for line in said if "Ctrl-C again stops at once" in line)
            driver.send_signal(signal.SIGINT)
            err = heard + "".join(said)
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    assert driver.returncode == 130, err
    assert "Traceback" not in err
    assert "run the same command to continue" in err


def test_a_second_driver_is_told_who_holds_the_run(
    pages: Path, tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    fields = {"model": SLOW_MODEL, "workers": SLOW_WORKERS}
    job = Job(tmp_path, str(pages), str(tmp_path / "run"), shared_ray, fields=fields)
    with job.started() as first:
        job.has_committed(first, 1)
        first.send_signal(signal.SIGSTOP)  # it still holds the run, and will not end meanwhile
        assert first.poll() is None, first.communicate()
        code, said, _ = job.run()
        assert code == 75
        assert f"pid {first.pid}" in said["error"]
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=patient(200))
    assert first.returncode == 0, err
    assert len(job.rows()) == PAGES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if os.geteuid() != 0 or mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_with_one_line_and_it_continues_once_mended(
    pages: Path, small_disk: Path, tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    job = Job(tmp_path, str(pages), str(small_disk / "run"), shared_ray)
    code, said, err = job.run()
    assert code == 1, err
    assert "no space left" in said["error"]
    assert "Traceback" not in err
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, summary, err = job.run()
    assert code == 0, err
    assert summary["images"] == len(job.rows()) == PAGES
    assert summary["quarantined"] == 0

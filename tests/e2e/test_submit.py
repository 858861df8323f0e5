"""`labelfleet submit` against a real job server: attach, detach, exit codes, increments, tokens.

One head, with token auth, for the module; the tests build on each other's run in their order.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.demo.digits import make_pages
from storage.objects.json_records import json_record
from storage.runs.lock import LOCK_KEY, Owner, read_lock, run_lock
from storage.stores.local import LocalStore
from tests.e2e.jobs import DIGITS, LABELFLEET, Job, wait_until
from tests.support.patience import patient
from tests.support.ray.ray_head import RayHead, ray_head

pytestmark = pytest.mark.slow

PAGES = 12


@dataclass
class Place:
    """The folder a user submits from: a config beside the weights it names, and secrets around."""

    folder: Path
    head: RayHead

    @property
    def run(self) -> Job:
        """The run, to look at."""
        return Job(self.folder, str(self.folder / "in"), str(self.folder / "out"))

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = [LABELFLEET, "submit", "cells.yaml", "--address", self.head.jobs, *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **self.head.env, **variables},
        )  # fmt: skip

    def submit(self, *arguments: str, **variables: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, the JSON of the last line, stderr."""
        with self.start("--json", *arguments, **variables) as process:
            out, err = process.communicate(timeout=patient(250))
        return process.returncode, json.loads(out.splitlines()[-1]), err

    def jobs(self) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self.head.token}"}
        answer = httpx.get(f"{self.head.jobs}/api/jobs/", headers=headers, timeout=30)
        found = answer.json()
        assert isinstance(found, list)
        return [job for job in found if job["submission_id"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("submit")
    make_pages(folder / "pages", images=PAGES + 2, seed=9, broken=False)
    names = sorted(p.name for p in (folder / "pages/images").iterdir())
    (folder / "in").mkdir()
    for name in names[:PAGES]:
        shutil.copy(folder / "pages/images" / name, folder / "in" / name)
    shutil.copy(DIGITS, folder / "digits.safetensors")
    (folder / ".env").write_text("AWS_SECRET_ACCESS_KEY=hunter2")
    (folder / "cells.yaml").write_text(
        """
name: cells
source: {url: in, shard_size: 4}
output: out
model: {checkpoint: digits.safetensors}
workers: {count: 1}
max_bad_share: 0.01
"""
    )
    # What a role or a mounted secret gives the nodes: jobs see it, and it is never sent.
    with ray_head({"AWS_SECRET_ACCESS_KEY": "of-the-node"}) as head:
        yield Place(folder, head)


def test_ctrl_c_detaches_the_job_goes_on_and_submitting_again_attaches(place: Place) -> None:
    # The job waits half a minute for this one's sign of life: it has not ended when it is attached.
    elsewhere = Owner("t" * 16, "elsewhere", "its boot", 1, "1", "labelfleet gc")
    output = LocalStore(str(place.folder / "out"))
    output.put(LOCK_KEY, json_record(asdict(elsewhere)))
    first = place.start(AWS_SECRET_ACCESS_KEY="hunter2")
    assert first.stderr is not None
    assert "submitted labelfleet-cells-" in first.stderr.readline()
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=patient(60))
    assert first.returncode == 130, err
    assert "detached from labelfleet-cells-" in err
    assert f"labelfleet submit cells.yaml --address {place.head.jobs}" in err
    assert f"ray job stop --address {place.head.jobs} labelfleet-cells-" in err

    with place.start("--json") as second:
        assert second.stderr is not None
        lines = iter(second.stderr.readline, "")
        heard = next((line for line in lines if "attached to it" in line), "never attached\n")
        if read_lock(output)[0] == elsewhere:
            output.delete(LOCK_KEY)
        err = heard + "".join(lines)
        out, _ = second.communicate()
    said = json.loads(out.splitlines()[-1])
    assert second.returncode == said["exit_code"] == 0, err
    assert said["attached"], err
    assert said["status"] == "SUCCEEDED"
    assert "attached to it" in err
    assert f"{PAGES} images" in err  # the job's own last lines came through
    assert len(place.jobs()) == 1
    assert len(place.run.rows()) == PAGES


def test_a_finished_run_gets_a_new_suffix_and_labels_only_what_changed(place: Place) -> None:
    before = place.run.rows()
    objects = {p.name: p.stat().st_mtime_ns for p in (place.folder / "out/annotations").iterdir()}
    deleted, changed, *_ = sorted(before)
    new, other = sorted(p.name for p in (place.folder / "pages/images").iterdir())[PAGES:]
    (place.folder / "in" / deleted).unlink()
    shutil.copy(place.folder / "pages/images" / other, place.folder / "in" / changed)
    shutil.copy(place.folder / "pages/images" / new, place.folder / "in" / new)
    (place.folder / "in/broken.png").write_bytes(b"no image")

    code, said, err = place.submit("--env", "AWS_PROFILE=plain")
    assert said["submission_id"].endswith("-2")
    [job] = [one for one in place.jobs() if one["submission_id"] == said["submission_id"]]
    assert job["runtime_env"]["env_vars"]["AWS_PROFILE"] == "plain"
    assert not said["attached"]
    assert code == said["exit_code"] == 3, err  # the broken one is more than max_bad_share
    rows = place.run.rows()
    assert rows.keys() == before.keys() - {deleted} | {new, "broken.png"}
    assert rows[changed].sha256 != before[changed].sha256
    assert rows["broken.png"].status == "undecodable"
    kept = {p.name: p.stat().st_mtime_ns for p in (place.folder / "out/annotations").iterdir()}
    assert objects.items() <= kept.items(), "a shard that was labelled was labelled again"
    assert len(kept) == len(objects) + 1  # one group of three: new, changed and broken


def test_a_run_held_by_another_process_exits_75(place: Place) -> None:
    with run_lock(LocalStore(str(place.folder / "out")), "labelfleet decide"):
        code, said, err = place.submit()
    assert code == said["exit_code"] == 75
    assert "labelfleet decide" in err


def test_a_job_that_is_stopped_ends_as_interrupted_and_is_not_waited_for(place: Place) -> None:
    with run_lock(LocalStore(str(place.folder / "out")), "labelfleet gc"):
        code, said, _ = place.submit("--no-wait")
        assert (code, said["exit_code"]) == (0, None)
        headers = {"Authorization": f"Bearer {place.head.token}"}
        url = f"{place.head.jobs}/api/jobs/{said['submission_id']}"
        httpx.post(f"{url}/stop", headers=headers, timeout=30).raise_for_status()
        ended = ("STOPPED", "FAILED")
        wait_until(lambda: httpx.get(url, headers=headers, timeout=30).json()["status"] in ended)


def test_what_the_cluster_shows_of_the_jobs_holds_no_secret(place: Place) -> None:
    shown = json.dumps(place.jobs())
    assert "labelfleet run run.yaml" in shown
    for secret in ("hunter2", "of-the-node", place.head.token, "AWS_SECRET"):
        assert secret not in shown
    packages = list(Path(place.head.folder).glob("session_*/runtime_resources/working_dir_files/*"))
    travelled = {p.name for package in packages if package.is_dir() for p in package.iterdir()}
    assert travelled == {"run.yaml", "model.checkpoint-digits.safetensors"}


def test_what_ray_logged_of_the_jobs_holds_no_secret(place: Place) -> None:
    logs = [p for p in Path(place.head.folder).glob("session_2*/logs/**/*") if p.is_file()]
    assert any(p.name.startswith("job-driver-") for p in logs)
    assert any(p.name.startswith("worker-") for p in logs)
    for path in logs:
        said = path.read_bytes()
        for secret in ("hunter2", "of-the-node", place.head.token):
            assert secret.encode() not in said, path


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RAY_AUTH_TOKEN": "x" * 32}, "wants another token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "does not name a readable file: /nowhere"),
    ],
)
def test_a_token_that_does_not_fit_is_one_readable_line(
    place: Place, variables: dict[str, str], words: str
) -> None:
    code, said, err = place.submit(**variables)
    assert code == 2
    assert words in said["error"]
    assert "RAY_AUTH_TOKEN_PATH" in said["hint"]
    assert "Traceback" not in err
    assert "x" * 32 not in err

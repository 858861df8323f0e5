"""Canary secrets in every place where a real one may be; then they are looked for everywhere."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from servers import S3Server
from tiny_run import fill_folder, run_fields

from storage.objects import open_store

pytestmark = pytest.mark.slow

SECRET_KEY = "canary/secret+key0001"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_SESSION_TOKEN": "canary-session-0002",
    "LABEL_STUDIO_API_KEY": "ca" * 18 + "0003",  # looks like a legacy token
    "LABEL_STUDIO_S3_SECRET_ACCESS_KEY": "canary-reviewers-0004",
    "DATABASE_PASSWORD": "canary-environment-0005",
}
SIGNATURE, HOOK = "canary-signature-0006", "canary-hook-0007"
CANARIES = (*ENVIRONMENT.values(), SIGNATURE, HOOK, "canary%2Fsecret")

# Ray's files go with it: so it is started here, a run joins it, and what it knows is written out.
PROGRAM = """
import json, os, shutil, subprocess, sys
import ray
from pipelines.cluster import ray_cluster
kept, *command = sys.argv[1:]
with ray_cluster("local"):
    where = ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *command, "--address", where])
    state = ray._private.state.state
    with open(f"{kept}/ray.txt", "w") as file:
        print(state.job_table(), state.actor_table(None), ray.nodes(), file=file)
    session = ray._private.worker._global_node.get_session_dir_path()
    shutil.copytree(f"{session}/logs", f"{kept}/logs")
sys.exit(done.returncode)
"""


class Web(http.server.SimpleHTTPRequestHandler):
    """Serves the checkpoint whatever its signature; takes no POST."""

    def log_message(self, *_: object) -> None:
        """Keep test output clean."""


@dataclass
class Scene:
    """Where everything is."""

    root: Path
    config: Path
    env: dict[str, str]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.root / "cwd", env=self.env, text=True,
            capture_output=True, check=False, timeout=280,
        )  # fmt: skip


@pytest.fixture(scope="module")
def web(nano_checkpoint: Path) -> Iterator[str]:
    folder = str(nano_checkpoint.parent)

    def handler(*given: object) -> Web:
        return Web(*given, directory=folder)  # type: ignore[arg-type]  # socketserver's own

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, web: str, nano_checkpoint: Path, moto_s3: S3Server
) -> Scene:
    root = tmp_path_factory.mktemp("scene")
    for name in ("home", "cwd", "kept", "in"):
        (root / name).mkdir()
    bucket = moto_s3.fresh_bucket()
    source = open_store(f"s3://{bucket}/in", moto_s3.options)
    for key in fill_folder(root / "in", 5):
        source.put(key, (root / "in" / key).read_bytes())
    source.put("bad.png", b"\x89PNG\r\n\x1a\nno image")
    config = root / "cells.yaml"
    fields = run_fields(
        f"s3://{bucket}/in", root / "out", nano_checkpoint,
        model={"checkpoint": f"{web}/{nano_checkpoint.name}?X-Amz-Signature={SIGNATURE}"},
        storage={"endpoint_url": moto_s3.options.endpoint_url, "region": "us-east-1"},
        notify=f"{web}/hooks/{HOOK}",
    )  # fmt: skip
    config.write_text(yaml.safe_dump(fields))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[2])])
    env |= ENVIRONMENT | {"AWS_ACCESS_KEY_ID": "AKIDCANARY", "HOME": str(root / "home")}
    env |= {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(root / "home/.cache")}
    # A busy machine is no failure.
    env |= {"RAY_raylet_start_wait_time_s": "200", "RAY_agent_register_timeout_ms": "200000"}
    return Scene(root, config, env)


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    found = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def text_of(file: Path) -> str:
    """A file's bytes, and of Parquet also every value in it."""
    raw = file.read_bytes().decode("latin-1")
    if file.suffix == ".parquet":
        table = pq.ParquetFile(file)
        raw += f"{table.metadata.metadata} {table.read().to_pylist()}"
    return raw


def canaries_in(text: str) -> set[str]:
    return {canary for canary in CANARIES if canary in text}


@pytest.fixture(scope="module")
def ran(scene: Scene) -> Scene:
    """A run over S3, and where it wrote."""
    root = scene.root
    watched = (root / "home", root / "cwd", root / "in")
    before = snapshot(*watched)
    config_before = scene.config.stat().st_mtime_ns
    done = scene.command("-c", PROGRAM, str(root / "kept"), "run", str(scene.config),
                         "--debug", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["ok"], summary["undecodable"]) == (5, 1)
    (root / "kept/run.txt").write_text(done.stdout + done.stderr)
    assert "notify: the webhook failed" in done.stderr  # it was tried, and its failure was logged
    changed = {p for p, said in snapshot(*watched).items() if before.get(p) != said}
    beside = ("home/.cache/labelfleet/", "home/.ray/auth_token")
    assert [p for p in changed if not p.startswith(tuple(f"{root}/{b}" for b in beside))] == []
    assert scene.config.stat().st_mtime_ns == config_before
    known = {"home", "cwd", "in", "kept", "out", "cells.yaml"}
    assert {p.name for p in root.iterdir()} == known
    return scene


def test_a_run_writes_below_its_output_its_cache_and_nowhere_else(ran: Scene) -> None:
    """The fixture has seen to home, working folder and source; this sees to the output."""
    made = {p.relative_to(ran.root / "out").parts[0] for p in (ran.root / "out").rglob("*")}
    assert made <= {"run.json", "source", "annotations", "ledger", "lock.json", ".labelfleet-lock"}
    assert (ran.root / "home/.ray/auth_token").stat().st_mode & 0o77 == 0


def test_no_secret_in_what_a_run_leaves_behind(ran: Scene) -> None:
    kinds = set()
    for folder in ("out", "home", "cwd"):
        for file in (p for p in (ran.root / folder).rglob("*") if p.is_file()):
            kinds.add(file.suffix)
            assert canaries_in(text_of(file)) == set(), file
    assert {".json", ".jsonl", ".parquet"} <= kinds


def test_no_secret_in_rays_jobs_actors_and_logs(ran: Scene) -> None:
    looked_at = [p for p in (ran.root / "kept").rglob("*") if p.is_file()]
    assert any("raylet" in p.name for p in looked_at)
    assert any("worker" in p.name for p in looked_at)
    for file in looked_at:
        assert canaries_in(text_of(file)) == set(), file
    assert "LabelActor" in (ran.root / "kept/ray.txt").read_text()


ERRORS: dict[str, tuple[str, ...]] = {
    "a report": ("report", "OUT"),
    "review without a server": ("review", "push", "OUT", "--url", "http://127.0.0.1:1"),
    "a password in a URL": ("status", f"s3://AKID:{SECRET_KEY}@bucket/x"),
    "a password in an endpoint": (
        "status", "s3://bucket/x", "--endpoint-url", f"http://me:{SECRET_KEY}@127.0.0.1:1",
    ),
    "a password in review's URL": ("review", "push", "OUT", "--url", f"http://me:{HOOK}@h:1"),
    "a bucket that is not there": ("plan", "CONFIG", "--set", "source.url=s3://not-there/x"),
    "a signed URL that is gone": (
        "run", "CONFIG", "--set", "output=OUT2",
        "--set", f"model.checkpoint=WEB/gone.pth?Signature={SIGNATURE}",
    ),
    "a webhook on the command line": ("plan", "CONFIG", "--set", f"notify=https://h/{HOOK}"),
    "a webhook in a config that is refused": ("plan", "CONFIG", "--set", "name=a b"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_no_secret_in_messages_logs_and_tracebacks(ran: Scene, web: str, name: str) -> None:
    places = {"OUT2": ran.root / "out2", "OUT": ran.root / "out", "CONFIG": ran.config, "WEB": web}
    arguments = list(ERRORS[name])
    for word, place in places.items():
        arguments = [a.replace(word, str(place)) for a in arguments]
    done = ran.command("-m", "pipelines.cli", *arguments, "--debug", "--json")
    assert (done.returncode == 0) == (name == "a report"), done.stderr
    assert name == "a report" or "Traceback" in done.stderr
    assert canaries_in(done.stdout + done.stderr) == set()
    for file in (p for p in (ran.root / "out").rglob("*") if p.is_file()):
        assert canaries_in(text_of(file)) == set(), file


def test_the_search_would_find_them(ran: Scene) -> None:
    assert canaries_in(ran.config.read_text()) == {SIGNATURE, HOOK}

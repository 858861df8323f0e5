"""A whole run, watched from below: an overlay over the file system catches all that it leaves.

Secrets lie wherever real ones may be; whatever was left or said is then searched for them. (Ray's
own logs are gone by then; test_submit.py reads those of jobs.)
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.demo.digits import make_pages
from storage.stores.open import open_store
from tests.e2e.jobs import LABELFLEET, Job
from tests.support.patience import patient
from tests.support.servers.s3 import S3Server

pytestmark = pytest.mark.slow

PAGES = 12
CANARIES = {
    "LABEL_STUDIO_API_KEY": "ca" * 18 + "0003",  # looks like a legacy token
    "LABEL_STUDIO_S3_SECRET_ACCESS_KEY": "canary-reviewers-0004",
    "DATABASE_PASSWORD": "canary-environment-0005",
    "RAY_AUTH_TOKEN": "canary0006" * 4,
}
HOOK = "canary-hook-0007"
# A root of its own: what is written below it lands in a tmpfs, from where it is copied out.
IN_OVERLAY = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
for shared in proc sys dev; do mount --rbind "/$shared" "$1/root/$shared"; done
code=0
env -C "$2" chroot "$1/root" env -C "$2" "${@:4}" || code=$?
cp -a "$1/upper/." "$3"
exit $code
"""


@dataclass
class Watched:
    """What a run in the overlay left.

    Attributes:
        code: its exit code.
        said: stdout and stderr.
        written: absolute paths of the files that were made or changed and are still there, or that
            were removed, with their bytes.
    """

    code: int
    said: str
    written: dict[str, bytes]


def watched(folder: Path, command: list[str], env: dict[str, str]) -> Watched:
    """Run a command in ``folder`` and catch what it writes anywhere."""
    for name in ("mount", "caught"):
        (folder / name).mkdir()
    wrapped = ["unshare", "--mount", "bash", "-c", IN_OVERLAY, "overlay"]
    places = [str(folder / "mount"), str(folder), str(folder / "caught")]
    ended = subprocess.run(
        [*wrapped, *places, *command], env=env, capture_output=True, text=True, timeout=patient(280)
    )
    return Watched(ended.returncode, ended.stdout + ended.stderr, dict(_files(folder / "caught")))


def _files(caught: Path) -> Iterator[tuple[str, bytes]]:
    for path in caught.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield f"/{path.relative_to(caught)}", path.read_bytes()
        elif not stat.S_ISDIR(mode):  # a link, or the mark of a file that is gone
            yield f"/{path.relative_to(caught)}", b""


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where this user may mount nothing."""
    folder = tmp_path_factory.mktemp("probe")
    ended = watched(folder, ["touch", str(folder / "here")], dict(os.environ))
    if ended.code:
        pytest.skip(f"needs the right to mount an overlay: {ended.said.strip()[:120]}")
    assert list(ended.written) == [str(folder / "here")]


def secrets_in(data: bytes, secrets: list[str]) -> list[str]:
    return [secret for secret in secrets if secret.encode() in data]


def test_a_run_writes_to_its_output_and_caches_alone_and_no_secret_anywhere(
    overlay: None, weed_s3: S3Server, tmp_path: Path
) -> None:
    bucket = weed_s3.fresh_bucket()
    make_pages(tmp_path / "pages", images=PAGES, seed=9)
    source = open_store(f"s3://{bucket}/in", weed_s3.options)
    for page in (tmp_path / "pages/images").iterdir():
        source.put(page.name, page.read_bytes())
    home, there = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    there.mkdir()
    job = Job(
        there, f"s3://{bucket}/in", f"s3://{bucket}/run", options=weed_s3.options,
        fields={"notify": f"{weed_s3.endpoint_url}/{HOOK}", "max_bad_share": 0.5},
    )  # fmt: skip
    config = job.config()
    env = {**os.environ, **weed_s3.env(), **CANARIES, "HOME": str(home)}
    for name in ("LABELFLEET_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        env.pop(name, None)
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # the installation's own caches are not the run's doing
    command = [LABELFLEET, "run", str(config), "--json", "--debug"]
    found = watched(there, command, env)
    assert found.code == 0, found.said

    rows = job.rows()
    assert len(rows) == PAGES
    secrets = [*CANARIES.values(), weed_s3.secret_key, HOOK]
    assert secrets_in(found.said.encode(), secrets) == []
    store = open_store(job.output, weed_s3.options)
    for item in store.list(""):
        assert secrets_in(store.get(item.key), secrets) == [], item.key
    for path, data in found.written.items():
        assert secrets_in(data, secrets) == [], path
    allowed = (f"{home}/.cache/labelfleet/",)
    # What a killed run left in /tmp is swept; in the overlay, that is a mark without bytes.
    gone = {path for path, data in found.written.items() if not data}
    swept = {path for path in gone if path.startswith(("/tmp/lf-", "/tmp/labelfleet-"))}
    others = found.written.keys() - swept
    assert [path for path in others if not path.startswith(allowed)] == []
    assert secrets_in(config.read_bytes(), secrets) == [HOOK]  # the search would find it


def test_a_cluster_whose_token_is_another_is_one_readable_line(
    shared_ray: dict[str, str], tmp_path: Path
) -> None:
    make_pages(tmp_path / "pages", images=1, seed=9)
    wrong = {**shared_ray, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": CANARIES["RAY_AUTH_TOKEN"]}
    job = Job(tmp_path, str(tmp_path / "pages/images"), str(tmp_path / "run"), wrong)
    code, said, err = job.run()
    assert (code, said.get("error", "").count("\n")) == (2, 0), err
    assert "RAY_AUTH_TOKEN" in said["hint"]
    assert "Traceback" not in err
    assert secrets_in(f"{said}{err}".encode(), [CANARIES["RAY_AUTH_TOKEN"]]) == []

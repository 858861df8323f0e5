"""What all tests share: where optional real data lies, and nothing that talks to the outside."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.support.ray.ray_server import ray_server
from tests.support.servers.label_studio import PROGRAM, LabelStudioServer, label_studio_server
from tests.support.servers.s3 import S3Server, credentials_env, moto_server, weed_server

# Tests start many processes; each would compile torch, Ray and super-gradients anew, for 20 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test judges how long an example took: machines may be busy. `make test` tries more examples.
# Both try the same ones every time, so that a commit that passed passes again; `make explore`
# draws new ones, and what it finds becomes an @example.
settings.register_profile("labelfleet", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=100, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("LABELFLEET_HYPOTHESIS", "labelfleet"))

ROOT = Path(__file__).resolve().parent.parent


def _company(file: str) -> str:
    """What a file's tests share a process for, with ``-n``: a server that is slow to start, or
    themselves."""
    text = (ROOT / file).read_text()
    if "label_studio: LabelStudioServer" in text:
        return "label_studio"
    return "ray" if "shared_ray: " in text or "local_ray: " in text else file


class _Companies(LoadScopeScheduling):  # type: ignore[misc]
    """(xdist's own ``loadgroup`` writes into node ids, which pytest 9.2 no longer lets it.)"""

    def _split_scope(self, nodeid: str) -> str:
        return _company(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Companies:
    return _Companies(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: the servers, then whole runs."""
    order = ["label_studio", "ray", "chaos", "e2e", "workers"]
    files = {item.path for item in items}
    ranks = {}
    for file in files:
        company = _company(str(file.relative_to(ROOT)))
        name = company if company in order else file.relative_to(ROOT).parts[1]
        ranks[file] = order.index(name) if name in order else len(order)
    items.sort(key=lambda item: ranks[item.path])


def _optional_folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not path.is_dir():
        pytest.skip(f"needs the folder {path} (or set {variable}); it is not there")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real images with ground truth: bccd, hituav, coco_ccby."""
    return _optional_folder("LABELFLEET_DATA", "data")


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """A small trained YOLO-NAS to start with."""
    return _optional_folder("LABELFLEET_MODELS", "models")


@pytest.fixture(scope="session")
def nano_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's own small YOLO-NAS, which describes itself: a config needs only
    its path. (A copy, since a run refuses to go on when the weights change under it.)"""
    original = ROOT / "pipelines/assets/digits_nano.safetensors"
    return Path(shutil.copy(original, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def shared_ray(weed_s3: S3Server) -> Iterator[dict[str, str]]:
    """One real Ray for all tests of this process; seconds to start. Its workers reach ``weed_s3``.

    Gives the environment in which a process joins it; this one is not connected.
    """
    with ray_server(weed_s3.env()) as joining:
        yield joining


@pytest.fixture(scope="module")
def local_ray(shared_ray: dict[str, str]) -> Iterator[dict[str, str]]:
    """This process is connected to ``shared_ray`` until the module ends."""
    from ray._private import ray_constants  # heavy, and most tests need none
    from ray._private.authentication_test_utils import reset_auth_token_state

    from pipelines.cluster.ray_cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in shared_ray.items():
            patch.setenv(name, value)
        # Both were read from the environment when ray was imported.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        reset_auth_token_state()
        with ray_cluster(shared_ray["RAY_ADDRESS"]):
            for name in shared_ray:  # what is for its processes, not for other Rays
                patch.delenv(name)
            yield shared_ray
    reset_auth_token_state()  # another module's Ray may have no token


@pytest.fixture(scope="session")
def s3_credentials() -> Iterator[None]:
    """This process's boto3 sees the test servers' credentials and nothing of the machine's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in credentials_env().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def moto_s3(s3_credentials: None) -> Iterator[S3Server]:
    """moto: quick to start, checks no credentials."""
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def weed_s3(s3_credentials: None) -> Iterator[S3Server]:
    """SeaweedFS: a real object store with credentials; seconds to start."""
    with weed_server() as server:
        yield server


@pytest.fixture(scope="session")
def label_studio() -> Iterator[LabelStudioServer]:
    """A real Label Studio; half a minute to start."""
    if not PROGRAM.exists():
        pytest.skip("needs Label Studio in its own environment: make label-studio")
    with label_studio_server() as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hostile file names in captured logs would end xdist, which sends reports as UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report

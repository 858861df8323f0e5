"""What all tests share: where optional real data lies, and nothing that talks to the outside."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from label_studio_server import PROGRAM, LabelStudioServer, label_studio_server
from servers import S3Server, credentials_env, moto_server, weed_server

# Tests start many processes; each would compile torch, Ray and super-gradients anew, for 20 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A busy machine is no failure: no test judges how long an example took.
settings.register_profile("labelfleet", deadline=None)
settings.load_profile("labelfleet")

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.fixture(scope="module")
def local_ray() -> Iterator[dict[str, str]]:
    """One real Ray on this machine for the tests of a module.

    Seconds to start; this process is connected to it until the module ends. Gives the environment
    in which another process can join it: RAY_ADDRESS, its token, and that it is on loopback.
    """
    import ray  # heavy, and most tests need none

    from pipelines.cluster import ray_cluster

    before = set(os.environ)
    with ray_cluster("local"), pytest.MonkeyPatch.context() as patch:
        added = {name: os.environ[name] for name in set(os.environ) - before}
        for name in added:  # what is for its processes, not for other Rays
            patch.delenv(name)
        address = ray.get_runtime_context().gcs_address
        token = str(Path.home() / ".ray/auth_token")
        yield {**added, "RAY_ADDRESS": address, "RAY_AUTH_TOKEN_PATH": token}


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

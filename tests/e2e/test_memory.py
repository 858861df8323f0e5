"""A worker's memory does not grow with its shard: 700 MB against 20 MB, real model, own process."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.jobs import DIGITS
from tests.support.patience import patient

pytestmark = pytest.mark.slow

# Runs in a process of its own: builds the labeller a worker builds, labels one tar, tells its peak.
WORKER = """
import resource, sys
from pathlib import Path
from storage.runs.manifest import Manifest
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_store
from storage.shards.selecting import tar_shards
from pipelines.config.run_config import RunConfig
from pipelines.labelling.open_run import open_run
from workers.labelling.assemble import open_labeller
from workers.spec import LabellerOptions, WorkerSpec
source, output, checkpoint = sys.argv[1:]
config = RunConfig.model_validate(
    {"name": "m", "source": {"url": source}, "output": output, "model": {"checkpoint": checkpoint}}
)
run = open_run(config, cuda=False)
spec = WorkerSpec(run.model, run.source.url, run.manifest.url, StorageOptions(),
                  LabellerOptions(), torch_threads=2)
labeller = open_labeller(spec)
(shard,) = tar_shards(run.source.list())
commit = labeller.label(shard, "only")
print(commit.footer.counts["ok"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_tar(path: Path, nbytes: int) -> int:
    """A tar of about ``nbytes``, all distinct JPEGs of some 2.5 MB; returns how many."""
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1400, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    photo = file.getvalue()
    count = nbytes // len(photo)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            # A comment after the start marker makes each file another one.
            body = photo[:2] + b"\xff\xfe\x00\x08" + i.to_bytes(6, "big") + photo[2:]
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return count


def peak_mib(folder: Path, nbytes: int) -> int:
    source = folder / "source"
    source.mkdir(parents=True)
    images = write_tar(source / "one.tar", nbytes)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(source), str(folder / "run"), str(DIGITS)],
        capture_output=True, text=True, check=False, timeout=patient(900),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ok, mib = map(int, done.stdout.split()[-2:])
    assert ok == images
    return mib


@pytest.mark.timeout(1200)
def test_a_large_shard_costs_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    small = peak_mib(tmp_path / "small", 20 * 1000**2)
    large = peak_mib(tmp_path / "large", 700 * 1000**2)  # several times the limit, were it held
    assert large - small <= 200, f"{large} MiB against {small} MiB"

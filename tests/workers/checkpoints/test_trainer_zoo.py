"""Checkpoints as super-gradients' own Trainer writes them, of every dataset class it has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.objects.protocols import StorageOptions
from tests.support.samples.trainer_zoo import ARCH, NAMES, SIZE
from workers.checkpoints.file import read_checkpoint
from workers.images.preprocessing import Preprocessing
from workers.models.resolve import resolve_model
from workers.spec import ModelRequest
from workers.yolo_nas.network import load_dense

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PADDED = Preprocessing(size=SIZE, resize_to=SIZE, padding="bottom_right", channels="BGR")
STRETCHED = Preprocessing(
    size=SIZE, resize_to=SIZE, keep_aspect=False, padding="center", channels="BGR"
)
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)
EXPECTED = {
    "coco": (tuple(NAMES), PADDED),
    "coco_stretched": (tuple(NAMES), STRETCHED),
    "roboflow": (tuple(NAMES), PADDED),
    "voc": (tuple(VOC.split()), PADDED),
    "voc_format": (tuple(NAMES), PADDED),
    "yolo": (tuple(NAMES), PADDED),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "CRASH_HANDLER": "FALSE", "OMP_NUM_THREADS": "1",
        "SUPER_GRADIENTS_LOG_DIR": str(folder / "logs"),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.support.samples.trainer_zoo", str(folder)]
    made = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=1200
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return folder


@pytest.mark.parametrize("dataset", EXPECTED)
def test_every_file_is_read(zoo: Path, dataset: str) -> None:
    files = {path.name: path for path in (zoo / dataset).rglob("*.pth")}
    assert {"average_model.pth", "ckpt_best.pth", "ckpt_latest.pth"} <= set(files)
    classes, preprocessing = EXPECTED[dataset]
    for name, path in files.items():
        checkpoint = read_checkpoint(path)
        assert (checkpoint.classes, checkpoint.preprocessing) == (classes, preprocessing), name
        assert checkpoint.nms_iou == 0.65
        spec = resolve_model(
            ModelRequest(str(path), arch=str(ARCH)), StorageOptions(), device="cpu"
        )
        assert spec.remarks == ()
        load_dense(spec, StorageOptions())  # every weight is there and fits

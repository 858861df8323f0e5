"""modern-yolonas builds super-gradients' network: the same weights fit, boxes and scores agree."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pipelines.doctor.examine import examine
from storage.errors import ConfigError, NotInstalled
from storage.extras import not_installed
from storage.objects.protocols import StorageOptions
from tests.support.samples.network_package import build_with, hide
from workers.checkpoints.description import Description, canonical_arch
from workers.checkpoints.file import save_checkpoint
from workers.images.preprocessing import Preprocessing
from workers.models.load_torch import load_detector
from workers.models.resolve import resolve_model
from workers.spec import ModelRequest
from workers.yolo_nas import modern
from workers.yolo_nas.dense import DenseDetector
from workers.yolo_nas.network import build_network, fuse, import_super_gradients

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("modern_yolonas") is None, reason="modern-yolonas is not installed"
)

ARCH = Path(__file__).resolve().parents[3] / "pipelines" / "assets" / "digits_nano_arch.yaml"
NANO: dict[str, Any] = yaml.safe_load(ARCH.read_text())
PARTLY: dict[str, Any] = {
    "bn_eps": "1e-3",  # as PyYAML reads super-gradients' own files
    "backbone": {"NStageBackbone": {"stem": {"YoloNASStem": {"out_channels": 32}}}},
    "heads": {"NDFLHeads": {"reg_max": 8}},
}
SILU = {"context_module": {"SPP": {"activation_type": "silu"}}}
SIZE = (96, 64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(network: nn.Module) -> nn.Module:
    """Give it batch-norm statistics, which a new network has not."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) + 0.5
    return network.eval()


@pytest.mark.slow  # super-gradients takes seconds to import
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("yolo_nas_s", NANO),
        ("yolo_nas_s", PARTLY),
        ("yolo_nas_s", {}),
        ("yolo_nas_m", {}),
        ("yolo_nas_l", {}),
    ],
)
def test_both_packages_build_one_network(name: str, arch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = trained(build_network(name, json.dumps(arch) if arch else None, 5))
    theirs = modern.build(name, json.loads(canonical_arch(arch)), 5).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randint(0, 256, (2, *SIZE, 3), dtype=torch.uint8)
    how = Preprocessing(size=SIZE, resize_to=SIZE, mean=(0.1, 0.2, 0.3), channels="BGR")
    fuse(ours, SIZE)
    fuse(theirs, SIZE)
    assert not [m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.inference_mode():
        wanted = DenseDetector(ours, how).eval()(images)
        got = DenseDetector(theirs, how).eval()(images)
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a, b)


def test_labelling_works_where_it_alone_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_with("modern-yolonas", monkeypatch)
    torch.manual_seed(0)
    how = Preprocessing(size=SIZE, resize_to=SIZE)
    path = tmp_path / "own.safetensors"
    save_checkpoint(
        path,
        trained(build_network("yolo_nas_s", json.dumps(NANO), 2)).state_dict(),
        Description(
            name="yolo_nas_s",
            arch_params=json.dumps(NANO),
            classes=("cat", "dog"),
            preprocessing=how,
            licence=None,
            training={},
        ),
    )
    request = ModelRequest(checkpoint=str(path), score_floor=0.001)
    detector = load_detector(
        resolve_model(request, StorageOptions(), device="cpu"), StorageOptions(), threads=1
    )
    batch = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), np.uint8)
    together = detector.detect(batch)
    assert sum(len(found) for found in together) > 0
    for image, found in zip(batch, together, strict=True):
        (alone,) = detector.detect(image[None])
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=0.05)


_ALONE = """
import sys
sys.modules["super_gradients"] = None
from workers.yolo_nas.network import build_network
build_network("yolo_nas_s", None, 3)
import importlib.util
assert importlib.util.find_spec("modern_yolonas").submodule_search_locations
left = {"modern_yolonas", "huggingface_hub", "torchvision", "cv2", "PIL"} & set(sys.modules)
assert not left, left
"""


@pytest.mark.slow
def test_only_the_modules_of_the_network_are_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ALONE],
        capture_output=True, text=True, check=False, timeout=300,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "what"),
    [
        ({"bn_eps": 1e-5}, "bn_eps: 1e-05"),
        ({"in_channels": 4}, "in_channels: 4"),
        ({"pooling": 1}, "pooling: 1"),
        ({"neck": 3}, "3 where YoloNASPANNeckWithC2 is expected"),
        ({"backbone": {"os.system": {"command": "touch ran"}}}, "where NStageBackbone is expected"),
        ({"backbone": {"NStageBackbone": {"out_layers": ["stage1"]}}}, "out_layers"),
        ({"backbone": {"NStageBackbone": {"stages": []}}}, "a number of stages other than 4"),
        ({"heads": {"NDFLHeads": {"eval_size": [64, 64]}}}, "eval_size"),
        ({"heads": {"NDFLHeads": {"heads_list": []}}}, "a number of heads other than 3"),
        (
            {"neck": {"YoloNASPANNeckWithC2": {"neck1": {"YoloNASUpStage": {"dropout_rate": 1}}}}},
            "dropout_rate: 1 of YoloNASUpStage",
        ),
        ({"backbone": {"NStageBackbone": SILU}}, "activation_type: 'silu' of SPP"),
        ({"heads": {"NDFLHeads": {"reg_max": -3}}}, "RuntimeError"),
    ],
)  # fmt: skip
def test_what_it_would_build_otherwise_is_refused(
    arch: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_with("modern-yolonas", monkeypatch)
    with pytest.raises(ConfigError, match="modern-yolonas cannot build yolo_nas_s") as caught:
        build_network("yolo_nas_s", json.dumps(arch), 3)
    assert what in caught.value.message


def test_without_either_package_the_error_names_the_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide("super-gradients", monkeypatch)
    hide("modern-yolonas", monkeypatch)
    with pytest.raises(NotInstalled, match="needs super-gradients or modern-yolonas") as caught:
        build_network("yolo_nas_s", None, 3)
    assert caught.value.hint
    assert "labelfleet[run]' brings modern-yolonas" in caught.value.hint


def test_training_says_that_it_needs_super_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("super-gradients", monkeypatch)
    with pytest.raises(ModuleNotFoundError) as caught:
        import_super_gradients()
    told = not_installed(caught.value)  # as the command line translates it
    assert told is not None
    assert told.message == "this needs super-gradients, which is not installed"


def test_doctor_says_what_builds_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    build_with("modern-yolonas", monkeypatch)

    def of_a_machine_without(distribution: str) -> str:
        if distribution == "super-gradients":
            raise PackageNotFoundError(distribution)
        return version(distribution)

    monkeypatch.setattr("pipelines.doctor.examine.version", of_a_machine_without)
    found = {finding.subject: finding for finding in examine().findings}
    assert found["super-gradients"].level == "note"
    assert found["super-gradients"].found == "not installed; train, round and suite need it"
    assert found["runtime torch"].found.startswith("modern-yolonas built a YOLO-NAS S of 19.")

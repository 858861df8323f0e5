"""The network as it is run is the network as super-gradients builds it, whoever builds it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from storage.errors import CheckpointError, ConfigError, ModelError
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from tests.support.samples.dense_detections import detections_from_dense
from tests.support.samples.network_package import PACKAGES, build_with
from tests.support.samples.parity import CLASSES, Boxes, iou
from workers.checkpoints.description import Description
from workers.checkpoints.file import read_checkpoint, save_checkpoint
from workers.detectors.nms import NmsRules
from workers.images.decode import decode
from workers.images.letterbox import letterbox
from workers.images.preprocessing import Preprocessing
from workers.models.load_torch import load_detector
from workers.models.resolve import coco_preprocessing, read_arch, resolve_model
from workers.spec import ModelRequest, ModelSpec
from workers.yolo_nas.dense import DenseDetector
from workers.yolo_nas.network import Package, build_network, fuse, load_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = StorageOptions()
SIZE = (320, 320)


@pytest.fixture(scope="session")
def spec(models_dir: Path) -> ModelSpec:
    request = ModelRequest(
        checkpoint=str(models_dir / "bccd_nano.safetensors"),
        arch=str(models_dir / "bccd_nano_arch.yaml"),
        classes=CLASSES,
        image_size=SIZE,
    )
    return resolve_model(request, OPTIONS, device="cpu")


@pytest.fixture(scope="session")
def batch(data_dir: Path) -> NDArray[np.uint8]:
    """Six real images, letterboxed: uint8 [6, 320, 320, 3]."""
    paths = sorted((data_dir / "bccd" / "images").glob("*.jpg"))[:6]
    pixels = [decode(path.read_bytes(), max_pixels=10**8).pixels for path in paths]
    return np.stack([letterbox(image, coco_preprocessing(SIZE))[0] for image in pixels])


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Package:
    """What the network is built with."""
    build_with(request.param, monkeypatch)
    return request.param  # type: ignore[no-any-return]  # untyped in pytest


def decoded(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and scores: super-gradients' network also gives the raw ones."""
    first, second = output
    return first if isinstance(first, tuple) else (first, second)


def unfused(spec: ModelSpec) -> nn.Module:
    network = build_network(spec.name, spec.arch_params, len(spec.classes))
    load_weights(network, read_checkpoint(Path(spec.checkpoint)))
    return network.eval()


@pytest.mark.usefixtures("package")
def test_fully_fused_boxes_are_the_unfused_ones(spec: ModelSpec, batch: NDArray[np.uint8]) -> None:
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        boxes, scores = decoded(unfused(spec)(pixels))
        network = fuse(unfused(spec), SIZE)
        dense = DenseDetector(network, spec.preprocessing).eval()
        got_boxes, got_scores, std, entropy = dense(torch.from_numpy(batch))
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    likely = scores.amax(-1) > 0.01
    assert likely.sum() > 500
    assert (got_boxes - boxes)[likely].abs().max() < 1e-3
    assert (got_boxes - boxes)[likely].abs().mean() < 1e-4
    assert (got_scores - scores).abs().max() < 1e-4
    assert std.shape == boxes.shape
    assert entropy.shape == scores.shape[:2]
    assert (std >= 0).all()
    assert (entropy >= -1e-6).all()
    assert (entropy <= np.log(17) + 1e-5).all()


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", ["yolo_nas_s", "yolo_nas_m", "yolo_nas_l"])
def test_the_unscaled_networks(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, None, 80).eval()
    pixels = torch.randint(0, 256, (1, 128, 96, 3), dtype=torch.uint8)
    preprocessing = Preprocessing(
        size=(128, 96), resize_to=(128, 96), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    normalised = (pixels / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.4])
    with torch.inference_mode():
        boxes, scores = decoded(network(normalised.permute(0, 3, 1, 2)))
        dense = DenseDetector(fuse(network, (128, 96)), preprocessing).eval()
        got = dense(pixels)
    torch.testing.assert_close(got[0], boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(got[1], scores, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("package")
def test_bgr_networks_see_bgr(spec: ModelSpec, batch: NDArray[np.uint8]) -> None:
    mean, std = (0.1, 0.2, 0.3), (1.1, 1.2, 1.3)
    rgb = dataclasses.replace(spec.preprocessing, mean=mean, std=std)
    bgr = dataclasses.replace(rgb, channels="BGR")
    with torch.inference_mode():
        straight = DenseDetector(fuse(unfused(spec), SIZE), rgb).eval()
        swapped = DenseDetector(fuse(unfused(spec), SIZE), bgr).eval()
        as_bgr = torch.from_numpy(np.ascontiguousarray(batch[..., ::-1]))
        for a, b in zip(straight(as_bgr), swapped(torch.from_numpy(batch)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_detections_do_not_depend_on_the_batch(spec: ModelSpec, batch: NDArray[np.uint8]) -> None:
    detector = load_detector(spec, OPTIONS, threads=2)
    together = detector.detect(batch)
    assert sum(len(one) for one in together) > 200
    for i, one in enumerate(together):
        alone = detector.detect(batch[i : i + 1])[0]
        assert_same(one, alone)


def assert_same(a: Detections, b: Detections) -> None:
    """Equal to 0.05 px and 1e-3 in score, the limits of sameness of two runs."""
    assert len(a) == len(b)
    assert set(a.anchor.tolist()) == set(b.anchor.tolist())
    first, second = (np.lexsort((d.category_ids, d.anchor)) for d in (a, b))
    np.testing.assert_allclose(a.boxes[first], b.boxes[second], atol=0.05)
    np.testing.assert_allclose(a.scores[first], b.scores[second], atol=1e-3)


@pytest.mark.usefixtures("package")
def test_the_dense_output_gives_the_same_detections(
    spec: ModelSpec, batch: NDArray[np.uint8]
) -> None:
    """What another runtime would do with the exported network."""
    dense = DenseDetector(fuse(unfused(spec), SIZE), spec.preprocessing).eval()
    with torch.inference_mode():
        output = [t.numpy() for t in dense(torch.from_numpy(batch))]
    rules = NmsRules(spec.score_floor, spec.nms_iou, spec.max_detections)
    for i, one in enumerate(load_detector(spec, OPTIONS, threads=2).detect(batch)):
        assert_same(
            one, detections_from_dense(*(t[i] for t in output), keep=spec.keep, rules=rules)
        )


@pytest.mark.usefixtures("package")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_wrapper_can_be_exported(
    spec: ModelSpec, batch: NDArray[np.uint8], tmp_path: Path
) -> None:
    """As ONNX, with any batch size, statistics included."""
    dense = DenseDetector(fuse(unfused(spec), SIZE), spec.preprocessing).eval()
    path, names = str(tmp_path / "dense.onnx"), ["boxes", "scores", "box_std", "entropy"]
    images = torch.from_numpy(batch)
    torch.onnx.export(
        dense,
        (images[:2],),
        path,
        dynamo=False,
        input_names=["images"],
        output_names=names,
        dynamic_axes={name: {0: "batch"} for name in ("images", *names)},
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = dense(images)
    for got, wanted in zip(session.run(None, {"images": batch}), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_finds_the_same_objects(
    spec: ModelSpec, batch: NDArray[np.uint8], precision: Any
) -> None:
    lower = dataclasses.replace(spec, precision=precision)
    exact = load_detector(spec, OPTIONS, threads=2).detect(batch)
    rounded = load_detector(lower, OPTIONS, threads=2).detect(batch)
    found = sure = 0
    for a, b in zip(exact, rounded, strict=True):
        assert b.boxes.dtype == b.scores.dtype == np.float32
        strong = Boxes(a.boxes, a.scores, a.category_ids).above(0.5)
        same = strong.classes[:, None] == b.category_ids[None]
        found += int(((iou(strong.xyxy, b.boxes) > 0.9) & same).any(1).sum())
        sure += len(strong.scores)
    assert sure > 40
    assert found >= 0.97 * sure


@pytest.mark.usefixtures("package")
def test_weights_that_do_not_fit(spec: ModelSpec, models_dir: Path) -> None:
    checkpoint = read_checkpoint(models_dir / "bccd_nano.safetensors")
    with pytest.raises(CheckpointError, match=r"bccd_nano\.safetensors does not fit") as caught:
        load_weights(build_network("yolo_nas_s", None, 3), checkpoint)
    assert (
        caught.value.hint == "the architecture differs: check model.name (s, m or l) and model.arch"
    )
    assert len(caught.value.message) < 400
    with pytest.raises(CheckpointError) as caught:
        load_weights(build_network(spec.name, spec.arch_params, 4), checkpoint)
    assert caught.value.hint == "the number of classes differs"
    assert "3 of another shape" not in caught.value.message  # weights and biases: six
    replaced = dataclasses.replace(spec, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="has sha256"):
        load_detector(replaced, OPTIONS, threads=1)


def test_what_is_not_there(spec: ModelSpec) -> None:
    for change in ({"runtime": "tensorrt"}, {"precision": "int8"}):
        with pytest.raises(ModelError, match="not available"):
            load_detector(dataclasses.replace(spec, **change), OPTIONS, threads=1)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            load_detector(dataclasses.replace(spec, device="cuda"), OPTIONS, threads=1)


@pytest.mark.parametrize(
    "arch",
    [
        '{"backbone": {"os.system": {"command": "touch ran"}}}',
        '{"backbone": "NStageBackbone"}',
        '{"heads": {"NDFLHeads": {"reg_max": -3}}}',
        '{"neck": 3}',
        '{"backbone": {"NStageBackbone": {"stem": {"YoloNASStem": {"out_channels": "x"}}}}}',
    ],
)
def test_architectures_that_cannot_be_built(
    arch: str, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{package} cannot build yolo_nas_s") as caught:
        build_network("yolo_nas_s", arch, 3)
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_saved_checkpoint_describes_itself(
    spec: ModelSpec, models_dir: Path, batch: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(
        path,
        {k: v.half() for k, v in unfused(spec).state_dict().items()},
        Description(
            name=spec.name,
            arch_params=read_arch(str(models_dir / "bccd_nano_arch.yaml"), OPTIONS),
            classes=CLASSES,
            preprocessing=spec.preprocessing,
            licence="CC0-1.0",
            training={},
        ),
    )
    own = resolve_model(ModelRequest(checkpoint=str(path)), OPTIONS, device="cpu")
    for a, b in zip(
        load_detector(own, OPTIONS, threads=2).detect(batch[:2]),
        load_detector(spec, OPTIONS, threads=2).detect(batch[:2]),
        strict=True,
    ):
        assert_same(a, b)


_IMPORT = """
import logging, sys, threading
out, err, root = sys.stdout, sys.stderr, logging.getLogger()
own = logging.getLogger("own")
own.setLevel(logging.INFO)
from workers.yolo_nas.network import import_super_gradients
importing = threading.Thread(target=import_super_gradients)
importing.start()
while importing.is_alive():  # meanwhile others print, and set up logging
    print("printed")
    logged = logging.NullHandler()
    root.handlers[:] = [logged]
    importing.join(0.02)
    assert sys.stdout is out and sys.stderr is err
    assert root.handlers == [logged] and root.level == logging.WARNING
    if not importing.is_alive():
        assert own.level == logging.INFO
        print("done")
"""


def test_importing_super_gradients_leaves_the_process_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    kept = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k in kept}
    # The second process of a node, which super-gradients would mute.
    environment |= {"HOME": str(home), "TMPDIR": str(tmp_path), "LOCAL_RANK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(__file__).parents[3],
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.splitlines()) == {"printed", "done"}
    written = [str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()]
    assert not [p for p in written if "labelfleet" not in p]
    assert not list(tmp_path.glob("labelfleet-*"))  # nor is the log folder left in TMPDIR


_DIGEST = """
import hashlib, sys, torch
if sys.argv[1] == "whole":
    from workers.yolo_nas.torchvision_ops import ensure_torchvision
    ensure_torchvision()
    from super_gradients.training import models
    torch.manual_seed(1)
    network = models.get("yolo_nas_s", num_classes=3)
else:
    from workers.yolo_nas.network import build_network
    torch.manual_seed(1)
    network = build_network("yolo_nas_s", None, 3)
    assert not {"torchmetrics", "pandas", "onnx.helper", "tensorboard"} & set(sys.modules)
network.eval()
with torch.inference_mode():
    boxes, scores = network(torch.rand(1, 3, 64, 64))[0]
shapes = [(k, tuple(v.shape)) for k, v in network.state_dict().items()]
digest = hashlib.sha256(repr(shapes).encode())
for tensor in [*network.state_dict().values(), boxes, scores]:
    digest.update(tensor.numpy().tobytes())
print(digest.hexdigest(), file=sys.__stdout__, flush=True)
"""


@pytest.mark.slow
def test_the_lazy_import_builds_what_the_whole_import_builds(tmp_path: Path) -> None:
    environment = {**os.environ, "SUPER_GRADIENTS_LOG_DIR": str(tmp_path), "CRASH_HANDLER": "FALSE"}
    lazy, whole = (
        subprocess.run(
            [sys.executable, "-c", _DIGEST, how],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=Path(__file__).parents[3],
            timeout=300,
        ).stdout.split()[-1]
        for how in ("lazy", "whole")
    )
    assert lazy == whole

"""Our boxes are those of super-gradients' ``predict()``, with its COCO pipeline and its own."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from storage.objects.protocols import StorageOptions
from tests.support.samples.network_package import build_with
from tests.support.samples.parity import (
    CLASSES,
    NMS_IOU,
    Boxes,
    Oracle,
    coco_style,
    dataset_style,
    iou,
    mean_average_precision,
    ours,
    unmatched,
)
from workers.checkpoints.file import read_checkpoint
from workers.models.resolve import resolve_model
from workers.spec import ModelRequest, ModelSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Comparison:
    """Both sides' boxes on all validation images, down to 0.05, and predict()'s own at 0.25."""

    spec: ModelSpec
    predicted: list[Boxes]
    predicted_low: list[Boxes]
    detected: list[Boxes]


@pytest.fixture(scope="session")
def val_images(data_dir: Path) -> list[tuple[int, Path]]:
    images = json.loads((data_dir / "bccd" / "val.json").read_text())["images"]
    assert len(images) == 87
    return [(i["id"], data_dir / "bccd" / "images" / i["file_name"]) for i in images]


def request(models_dir: Path, checkpoint: Path, **more: Any) -> ModelRequest:
    arch = str(models_dir / "bccd_nano_arch.yaml")
    return ModelRequest(checkpoint=str(checkpoint), arch=arch, nms_iou=NMS_IOU, **more)


def coco_spec(models_dir: Path) -> ModelSpec:
    weights = models_dir / "bccd_nano.safetensors"
    asked = request(models_dir, weights, classes=CLASSES, image_size=(320, 320))
    return resolve_model(asked, StorageOptions(), device="cpu")


def dataset_spec(models_dir: Path, folder: Path) -> ModelSpec:
    """From a .pth as super-gradients' trainer writes it; the config names only the file.

    The network is made one that was trained on BGR: its first convolutions read reversed.
    """
    state = read_checkpoint(models_dir / "bccd_nano.safetensors").load_state_dict()
    first = [name for name, w in state.items() if w.ndim == 4 and w.shape[1] == 3]
    assert len(first) == 3  # the 3x3 branch, the 1x1 branch, and the place of their fusion
    state |= {name: state[name].flip(1).contiguous() for name in first}
    path = folder / "ckpt_best.pth"
    params = {
        "class_names": OmegaConf.create(list(CLASSES)),
        "image_processor": dataset_style(320),
        "iou": 0.65,
        "conf": 0.5,
    }
    torch.save({"net": state, "acc": np.float64(0.5), "processing_params": params}, path)
    return resolve_model(request(models_dir, path), StorageOptions(), device="cpu")


@pytest.fixture(
    scope="session",
    params=[
        ("coco", "super-gradients"),
        ("dataset", "super-gradients"),
        ("dataset", "modern-yolonas"),
    ],
    ids=lambda param: "-".join(param),
)
def comparison(
    request: pytest.FixtureRequest,
    models_dir: Path,
    val_images: list[tuple[int, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Comparison:
    paths = [path for _, path in val_images]
    style, package = request.param
    if style == "coco":
        spec, processing = coco_spec(models_dir), coco_style(320)
    else:
        spec = dataset_spec(models_dir, tmp_path_factory.mktemp("checkpoint"))
        processing = dataset_style(320)
    oracle = Oracle(spec, processing)
    predicted, predicted_low = oracle.predict(paths, 0.25), oracle.predict(paths, 0.05)
    with pytest.MonkeyPatch.context() as only:
        build_with(package, only)
        return Comparison(spec, predicted, predicted_low, ours(spec, paths))


def test_every_box_of_predict_is_ours(comparison: Comparison) -> None:
    assert sum(len(b.scores) for b in comparison.predicted) > 500
    missed = [
        unmatched(theirs, mine.above(0.249))
        for theirs, mine in zip(comparison.predicted, comparison.detected, strict=True)
    ]
    assert sum(missed) == 0


def test_every_box_of_ours_is_one_of_predict(comparison: Comparison) -> None:
    # Where ours is just above the floor, predict's may be just below it.
    added = [
        unmatched(mine.above(0.251), theirs)
        for theirs, mine in zip(comparison.predicted, comparison.detected, strict=True)
    ]
    assert sum(added) == 0


def test_map_is_that_of_predict(
    comparison: Comparison, val_images: list[tuple[int, Path]], data_dir: Path
) -> None:
    ids = [image_id for image_id, _ in val_images]
    truth = data_dir / "bccd" / "val.json"
    theirs = mean_average_precision(truth, ids, comparison.predicted_low)
    mine = mean_average_precision(truth, ids, comparison.detected)
    print(f"mAP: predict {theirs:.3f}, ours {mine:.3f}")
    assert mine == pytest.approx(theirs, abs=0.1)
    assert mine > 50


def test_scaled_decoding_costs_no_map_and_hardly_moves_a_box(
    comparison: Comparison, val_images: list[tuple[int, Path]], data_dir: Path
) -> None:
    """At 320 these photos are decoded at half their size, which predict() never does."""
    paths = [path for _, path in val_images]
    mine = ours(comparison.spec, paths, scaled=True)
    ids, truth = [image_id for image_id, _ in val_images], data_dir / "bccd" / "val.json"
    whole = mean_average_precision(truth, ids, comparison.predicted_low)
    scaled = mean_average_precision(truth, ids, mine)
    moved, found, wanted = [], 0, 0
    for theirs, near in zip(comparison.predicted, mine, strict=True):
        overlap = iou(theirs.xyxy, near.xyxy) * (theirs.classes[:, None] == near.classes[None])
        fits = overlap.max(1) >= 0.75
        moved.append(np.abs(near.xyxy[overlap.argmax(1)] - theirs.xyxy)[fits] / 2)
        found, wanted = found + int(fits.sum()), wanted + len(fits)
    pixels = np.concatenate(moved)
    print(f"mAP: predict {whole:.2f}, scaled {scaled:.2f}; moved, input px: "
          f"median {np.median(pixels):.3f}, p95 {np.quantile(pixels, 0.95):.2f}")  # fmt: skip
    assert scaled == pytest.approx(whole, abs=0.5)
    assert found / wanted > 0.99
    assert np.median(pixels) < 0.15
    assert np.quantile(pixels, 0.95) < 1.0


def test_swapped_channels_would_be_noticed(
    comparison: Comparison, val_images: list[tuple[int, Path]]
) -> None:
    swapped = "RGB" if comparison.spec.preprocessing.channels == "BGR" else "BGR"
    wrong = dataclasses.replace(
        comparison.spec,
        preprocessing=dataclasses.replace(comparison.spec.preprocessing, channels=swapped),
    )
    few = [path for _, path in val_images[:4]]
    mine = ours(wrong, few)
    theirs = comparison.predicted[:4]
    missed = sum(unmatched(t, m.above(0.249)) for t, m in zip(theirs, mine, strict=True))
    assert missed > 0.5 * sum(len(b.scores) for b in theirs)

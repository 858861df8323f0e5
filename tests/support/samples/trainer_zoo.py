"""Checkpoints that super-gradients' own Trainer writes, one for each of its dataset classes.

Run as a program (``python -m tests.support.samples.trainer_zoo FOLDER``): the Trainer takes over
streams and loggers, which a test process cannot have. Each folder below FOLDER is named by its
dataset and holds what a user would find: ckpt_best.pth, ckpt_latest.pth, average_model.pth.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from workers.yolo_nas.torchvision_ops import ensure_torchvision

ARCH = Path(__file__).resolve().parents[3] / "examples" / "bccd" / "arch.yaml"
NAMES = ["Platelets", "RBC", "WBC"]
SIZE = (64, 96)  # height, width: a swap would show
_BOXES = [(8, 8, 40, 30), (30, 20, 60, 44)]


def make_zoo(folder: Path) -> None:
    """Train a tiny network for one epoch on each dataset class; see the module."""
    data = folder / "data"
    _write_data(data)
    from super_gradients.training.transforms.transforms import (
        DetectionPaddedRescale,
        DetectionRescale,
        DetectionStandardize,
        DetectionTargetsFormatTransform,
    )

    def targets() -> Any:
        return DetectionTargetsFormatTransform(
            input_dim=SIZE, output_format="LABEL_CXCYWH", max_targets=20
        )

    padded = [DetectionPaddedRescale(SIZE), DetectionStandardize(255.0), targets()]
    stretched = [DetectionRescale(SIZE), DetectionStandardize(255.0), targets()]
    for name in ("coco", "roboflow", "voc", "voc_format", "yolo"):
        _train(name, _dataset(name, data, padded), folder)
    _train("coco_stretched", _dataset("coco", data, stretched), folder)


def _dataset(kind: str, data: Path, transforms: list[Any]) -> Any:
    from super_gradients.training.datasets.detection_datasets import (
        coco_format_detection as coco,
    )
    from super_gradients.training.datasets.detection_datasets import (
        pascal_voc_detection as voc,
    )
    from super_gradients.training.datasets.detection_datasets import (
        pascal_voc_format_detection as voc_format,
    )
    from super_gradients.training.datasets.detection_datasets import (
        yolo_format_detection as yolo,
    )
    from super_gradients.training.datasets.detection_datasets.roboflow import roboflow100

    common: dict[str, Any] = {
        "data_dir": str(data), "input_dim": SIZE, "transforms": transforms,
        "ignore_empty_annotations": False,
    }  # fmt: skip
    if kind == "coco":
        return coco.COCOFormatDetectionDataset(
            json_annotation_file="coco.json", images_dir="images", with_crowd=False, **common
        )
    if kind == "yolo":
        return yolo.YoloDarknetFormatDetectionDataset(
            images_dir="images", labels_dir="labels", classes=NAMES, **common
        )
    if kind == "voc_format":
        return voc_format.PascalVOCFormatDetectionDataset(
            images_dir="images", labels_dir="xml", all_classes_list=NAMES, **common
        )
    if kind == "voc":
        return voc.PascalVOCDetectionDataset(images_dir="images", labels_dir="voc", **common)
    return roboflow100.RoboflowDetectionDataset(
        dataset_name="cells", split="train", with_crowd=False, **common
    )


def _train(name: str, dataset: Any, folder: Path) -> None:
    from super_gradients.training import Trainer, models
    from super_gradients.training.datasets.detection_datasets.detection_dataset import (
        DetectionDataset,
    )
    from super_gradients.training.losses import PPYoloELoss
    from super_gradients.training.metrics import DetectionMetrics_050
    from super_gradients.training.models.detection_models.pp_yolo_e import (
        PPYoloEPostPredictionCallback,
    )
    from super_gradients.training.sg_trainer import sg_trainer
    from super_gradients.training.utils.collate_fn import DetectionCollateFN
    from torch.utils.data import DataLoader
    from torchmetrics.classification import MulticlassAccuracy

    assert isinstance(dataset, DetectionDataset)
    classes = len(dataset.classes)
    network = models.get(
        "yolo_nas_s", arch_params=yaml.safe_load(ARCH.read_text()), num_classes=classes
    )
    collate = DetectionCollateFN()

    def contiguous(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Its own images are channels_last in memory, which corrupts it in backward on a CPU."""
        images, targets = collate(samples)
        return images.contiguous(), targets

    loader = DataLoader(dataset, batch_size=2, collate_fn=contiguous)
    after = PPYoloEPostPredictionCallback(
        score_threshold=0.01, nms_top_k=100, max_predictions=30, nms_threshold=0.7
    )
    metric = DetectionMetrics_050(
        num_cls=classes, normalize_targets=True, post_prediction_callback=after
    )
    # Its default metrics, which are not used here, are made the way of an older torchmetrics.
    sg_trainer.Accuracy = lambda: MulticlassAccuracy(num_classes=2)
    Trainer(experiment_name=name, ckpt_root_dir=str(folder)).train(
        model=network,
        training_params={
            "max_epochs": 1, "lr_mode": "CosineLRScheduler", "initial_lr": 1e-4,
            "optimizer": "AdamW", "ema": True, "ema_params": {"decay": 0.9, "decay_type":
            "threshold"}, "loss": PPYoloELoss(num_classes=classes, use_static_assigner=False),
            "valid_metrics_list": [metric], "metric_to_watch": "mAP@0.50",
            "greater_metric_to_watch_is_better": True, "average_best_models": True,
            "silent_mode": True, "save_ckpt_epoch_list": [], "run_validation_freq": 1,
        },
        train_loader=loader,
        valid_loader=loader,
    )  # fmt: skip


def _write_data(data: Path) -> None:
    """Four noisy images with two boxes each, annotated as each dataset class wants it."""
    for part in ("images", "labels", "xml", "voc", "cells/train"):
        (data / part).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)
        for part in ("images", "cells/train"):
            Image.fromarray(pixels).save(data / part / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 80, "height": 60})
        lines, objects, of_voc = [], [], []
        for k, (x1, y1, x2, y2) in enumerate(_BOXES):
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": 2 + 3 * k,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
            })  # fmt: skip
            box = f"{(x1 + x2) / 160} {(y1 + y2) / 120} {(x2 - x1) / 80} {(y2 - y1) / 60}"
            lines.append(f"{k} {box}")
            objects.append(_voc_object(NAMES[k], x1, y1, x2, y2))
            of_voc.append(f"{x1} {y1} {x2} {y2} {k}")
        (data / "labels" / f"{number}.txt").write_text("\n".join(lines))
        (data / "voc" / f"{number}.txt").write_text("\n".join(of_voc))
        (data / "xml" / f"{number}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    categories = [{"id": 2 + 3 * k, "name": name} for k, name in enumerate(NAMES)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (data / "coco.json").write_text(json.dumps(coco))
    root = {"id": 0, "name": "cells"}  # Roboflow's exports begin with a class nothing belongs to
    with_root = {**coco, "categories": [root, *categories]}
    (data / "cells/train/_annotations.coco.json").write_text(json.dumps(with_root))


def _voc_object(name: str, x1: int, y1: int, x2: int, y2: int) -> str:
    return (
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
    )


if __name__ == "__main__":
    # The Trainer reads its own snapshots back with torch.load, as it did before torch 2.6.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    ensure_torchvision()
    make_zoo(Path(sys.argv[1]))

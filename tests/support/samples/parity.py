"""super-gradients' ``predict()`` as an oracle, and how its boxes are matched with ours."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.objects.protocols import StorageOptions
from workers.checkpoints.file import read_checkpoint
from workers.images.decode import decode
from workers.images.letterbox import letterbox
from workers.models.load_torch import load_detector
from workers.spec import ModelSpec
from workers.yolo_nas.network import build_network, import_super_gradients, load_weights

CLASSES = ("RBC", "WBC", "Platelets")
NMS_IOU = 0.7


@dataclass(frozen=True)
class Boxes:
    """One image's boxes in pixels of the image: xyxy [N, 4], scores [N], classes [N]."""

    xyxy: NDArray[Any]
    scores: NDArray[Any]
    classes: NDArray[Any]

    def above(self, floor: float) -> Boxes:
        keep = self.scores >= floor
        return Boxes(self.xyxy[keep], self.scores[keep], self.classes[keep])


def coco_style(size: int) -> dict[str, Any]:
    """super-gradients' processing for its COCO weights, at another input size."""
    return {
        "ComposeProcessing": {
            "processings": [
                {"DetectionLongestMaxSizeRescale": {"output_shape": (size - 4, size - 4)}},
                {"DetectionCenterPadding": {"output_shape": (size, size), "pad_value": 114}},
                {"StandardizeImage": {"max_value": 255.0}},
                {"ImagePermute": {"permutation": (2, 0, 1)}},
            ]
        }
    }


def dataset_style(size: int) -> dict[str, Any]:
    """Return what super-gradients' trainer stores for its DetectionDataset with
    DetectionPaddedRescale."""
    return {
        "ComposeProcessing": {
            "processings": [
                "ReverseImageChannels",
                {"DetectionLongestMaxSizeRescale": {"output_shape": [size, size]}},
                {"DetectionLongestMaxSizeRescale": {"output_shape": (size, size)}},
                {"DetectionBottomRightPadding": {"output_shape": (size, size), "pad_value": 114}},
                {"ImagePermute": {"permutation": (2, 0, 1)}},
                {"StandardizeImage": {"max_value": 255.0}},
            ]
        }
    }


class Oracle:
    """``predict()`` of an unfused network, which it copies and fuses partly itself."""

    def __init__(self, spec: ModelSpec, processing: dict[str, Any]) -> None:
        import_super_gradients()
        self.network: Any = build_network(spec.name, spec.arch_params, len(spec.classes))
        load_weights(self.network, read_checkpoint(Path(spec.checkpoint)))
        self.network.eval()
        self.network.set_dataset_processing_params(
            class_names=list(spec.classes), image_processor=processing, iou=NMS_IOU, conf=0.25
        )

    def predict(self, paths: Sequence[Path], conf: float) -> list[Boxes]:
        images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        with contextlib.redirect_stderr(io.StringIO()):
            found = self.network.predict(images, conf=conf, batch_size=8)
        found = [found] if len(paths) == 1 else found
        results = []
        for one in found:
            p = one.prediction
            results.append(Boxes(p.bboxes_xyxy, p.confidence, p.labels.astype(int)))
        return results


def ours(
    spec: ModelSpec, paths: Sequence[Path], batch: int = 8, *, scaled: bool = False
) -> list[Boxes]:
    """Return the same images through decode (whole, or as small as a worker does), letterbox,
    detect."""
    detector = load_detector(spec, StorageOptions(), threads=2)
    results = []
    for start in range(0, len(paths), batch):
        inputs, ways_back = [], []
        for path in paths[start : start + batch]:
            enough = detector.preprocessing if scaled else None
            image = decode(path.read_bytes(), max_pixels=10**8, enough=enough)
            assert image.factor == (2 if scaled else 1)
            boxed, way_back = letterbox(
                image.pixels, detector.preprocessing, size=image.size, factor=image.factor
            )
            inputs.append(boxed)
            ways_back.append(way_back)
        for found, way_back in zip(detector.detect(np.stack(inputs)), ways_back, strict=True):
            found = way_back.invert(found)
            results.append(Boxes(found.boxes, found.scores, found.category_ids.astype(int)))
    return results


def unmatched(wanted: Boxes, offered: Boxes) -> int:
    """Return how many wanted boxes have no offered one of their class, IoU >= 0.99, score within
    1e-3."""
    if len(wanted.scores) == 0:
        return 0
    if len(offered.scores) == 0:
        return len(wanted.scores)
    fits = iou(wanted.xyxy, offered.xyxy) >= 0.99
    fits &= wanted.classes[:, None] == offered.classes[None]
    fits &= np.abs(wanted.scores[:, None] - offered.scores[None]) <= 1e-3
    return int((~fits.any(axis=1)).sum())


def iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """IoU matrix of xyxy boxes."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    overlap = np.clip(sides, 0, None).prod(-1)
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b)]
    return np.asarray(overlap / (areas[0][:, None] + areas[1][None] - overlap))


def mean_average_precision(truth: Path, image_ids: Sequence[int], found: Sequence[Boxes]) -> float:
    """COCO mAP in points (0-100)."""
    from faster_coco_eval import COCO, COCOeval_faster

    rows = [
        {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [*map(float, box[:2]), *map(float, box[2:] - box[:2])],
            "score": float(score),
        }
        for image_id, boxes in zip(image_ids, found, strict=True)
        for box, score, label in zip(boxes.xyxy, boxes.scores, boxes.classes, strict=True)
    ]
    annotations = json.loads(truth.read_text())
    ids = {c["name"]: c["id"] for c in annotations["categories"]}
    for row in rows:
        row["category_id"] = ids[CLASSES[row["category_id"]]]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(annotations)
        evaluation = COCOeval_faster(coco, coco.loadRes(rows), "bbox")
        evaluation.run()
    return float(evaluation.stats[0]) * 100

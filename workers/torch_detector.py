"""Runs a dense network with torch and decodes only what passes the score floor."""

from __future__ import annotations

import itertools
import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import ModelError
from storage.records import Detections
from workers.detector import Preprocessing
from workers.postprocess import NmsRules, best_candidates, suppress, top_classes
from workers.spec import ModelSpec

Candidates = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


class DenseNetwork(Protocol):
    """What is needed of ``yolo_nas.DenseDetector``."""

    points: Tensor
    strides: Tensor

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(
        self, distri: Tensor, points: Tensor, strides: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class TorchDetector:
    """A ``Detector`` on one torch device."""

    def __init__(self, dense: DenseNetwork, spec: ModelSpec) -> None:
        self._dense = dense
        self._spec = spec
        self._device = torch.device(spec.device)
        self._rules = NmsRules(spec.score_floor, spec.nms_iou, spec.max_detections)
        floor = min(max(spec.score_floor, 1e-9), 1 - 1e-6)
        # Below the floor by more than rounding: one cheap pass over all logits.
        self._logit_floor = math.log(floor / (1 - floor)) - 1e-3
        self._keep: Tensor | None = None
        if set(spec.keep) != set(range(len(spec.classes))):
            self._keep = torch.tensor(spec.keep, dtype=torch.long, device=self._device)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._spec.classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self._spec.preprocessing

    @torch.inference_mode()
    def detect(self, batch: NDArray[np.uint8]) -> list[Detections]:
        """See ``Detector.detect``. Raises ModelError when the network's output is not finite."""
        self._check_batch(batch)
        images = torch.from_numpy(batch).to(self._device, non_blocking=True)
        logits, distri = self._dense.raw(images)
        self._check_finite(logits.amax((1, 2)))
        per_image = self._candidates(logits)
        return self._detections(logits, distri, per_image)

    def _check_batch(self, batch: NDArray[np.uint8]) -> None:
        wanted = (*self._spec.preprocessing.size, 3)
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != wanted:
            raise ValueError(f"batch is {batch.dtype} {batch.shape}, not uint8 [B, {wanted}]")

    def _check_finite(self, per_image: Tensor) -> None:
        bad = (~per_image.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ModelError(
                f"the network's output is not finite for image(s) {bad} of the batch "
                f"({self._spec.precision} on {self._spec.device})",
                hint="the weights or the precision overflow: try `precision: fp32`",
            )

    def _candidates(self, logits: Tensor) -> list[Candidates]:
        """Per image: anchors, classes and scores of what enters NMS, highest score first."""
        seen = logits if self._keep is None else logits[..., self._keep]
        found = (seen > self._logit_floor).nonzero()
        image, anchor, column = found.unbind(1)
        label = column if self._keep is None else self._keep[column]
        scores = logits[image, anchor, label].sigmoid().cpu().numpy()
        index = (
            torch.stack([image, anchor, label]).cpu().numpy()[:, scores > self._rules.score_floor]
        )
        scores = scores[scores > self._rules.score_floor]
        bounds = np.searchsorted(index[0], np.arange(len(logits) + 1))
        picked: list[Candidates] = []
        for start, stop in itertools.pairwise(bounds):
            anchors, classes, found_scores = (a[start:stop] for a in (index[1], index[2], scores))
            best = best_candidates(found_scores, anchors, classes)
            picked.append((anchors[best], classes[best], found_scores[best]))
        return picked

    def _detections(
        self, logits: Tensor, distri: Tensor, per_image: list[Candidates]
    ) -> list[Detections]:
        counts = [len(p[2]) for p in per_image]
        images = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(self._device)
        anchors = torch.from_numpy(np.concatenate([p[0] for p in per_image])).to(self._device)
        dense = self._dense
        boxes_t, std_t, entropy_t = dense.decode(
            distri[images, anchors], dense.points[anchors], dense.strides[anchors]
        )
        class_scores = logits[images, anchors].sigmoid().cpu().numpy()
        boxes, std, entropy = (t.cpu().numpy() for t in (boxes_t, std_t, entropy_t))
        if not np.isfinite(boxes).all():
            self._check_finite(distri.amax((1, 2, 3)) - distri.amin((1, 2, 3)))
        results, start = [], 0
        for (anchor, classes, scores), n in zip(per_image, counts, strict=True):
            rows = slice(start, start + n)
            stay = suppress(boxes[rows], scores, classes, self._rules)
            topk_ids, topk_scores = top_classes(class_scores[rows][stay])
            results.append(
                Detections(
                    boxes=boxes[rows][stay],
                    scores=scores[stay],
                    category_ids=classes[stay].astype(np.int16),
                    topk_ids=topk_ids,
                    topk_scores=topk_scores,
                    box_std=std[rows][stay],
                    box_entropy=entropy[rows][stay],
                    anchor=anchor[stay].astype(np.int32),
                )
            )
            start += n
        return results

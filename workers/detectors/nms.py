"""From dense network output to detections: candidates, class-wise NMS, top-5 classes.

Runtime independent: numpy in, ``Detections`` out. The rules are those of super-gradients'
``predict()``: every (anchor, class) above the floor is a candidate of its own, the best 1,024 of
an image enter NMS, NMS runs within each class, at most ``max_detections`` leave it. A lower floor
than predict()'s only adds candidates behind the ones it would have had, so what it adds can
neither displace nor suppress them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import cv2
import numpy as np
from numpy.typing import NDArray

from storage.records import Detections

PRE_NMS_CANDIDATES = 1024
TOPK_CLASSES = 5


@dataclass(frozen=True, slots=True)
class NmsRules:
    """Limits of NMS: minimum score, maximum overlap, maximum number of detections.

    ``nms_iou`` None: the network outputs no duplicates, so no box is suppressed.
    """

    score_floor: float
    nms_iou: float | None
    max_detections: int


def best_candidates(
    scores: NDArray[np.float32], anchors: NDArray[np.int64], classes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Indices of the at most 1,024 best candidates [N] of one image, highest score first.

    Ties go to the lower anchor, then to the lower class: the same on every machine.
    """
    order: NDArray[np.int64] = np.lexsort((classes, anchors, -scores))
    return order[:PRE_NMS_CANDIDATES]


def suppress(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    classes: NDArray[np.int64],
    rules: NmsRules,
) -> NDArray[np.int64]:
    """Greedy NMS within each class; indices of what stays, highest score first.

    Args:
        boxes: float32 [N, 4], xyxy.
        scores: float32 [N], already in falling order.
        classes: int64 [N].
    """
    if len(scores) == 0:
        return np.zeros(0, np.int64)
    if rules.nms_iou is None:
        return np.arange(min(len(scores), rules.max_detections))
    xywh = boxes.astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    kept = cv2.dnn.NMSBoxesBatched(
        xywh,  # type: ignore[arg-type]  # the stubs ask for a list of rectangles
        scores,  # type: ignore[arg-type]
        classes.astype(np.int32),  # type: ignore[arg-type]
        -1.0,  # the floor was applied before
        rules.nms_iou,
    )
    stay = np.sort(np.asarray(kept, np.int64).reshape(-1))
    return stay[: rules.max_detections]


def top_classes(
    scores: NDArray[np.float32],
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Return the best min(5, C) classes of each row of ``scores`` [N, C]: ids and scores,
    descending."""
    k = min(TOPK_CLASSES, scores.shape[1])
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids.astype(np.int16), np.take_along_axis(scores, ids, axis=1)


@dataclass(frozen=True, slots=True)
class Selected:
    """What leaves ``SelectedDetector`` for B images, whatever ran it; K anchors each, in no order.

    Attributes:
        anchors: int32 [B, K].
        scores: float32 [B, K, C].
        boxes, box_std: float32 [B, K, 4]; xyxy in input pixels, and pixels.
        entropy: float32 [B, K], nats. It and ``box_std`` are None from other families than
            YOLO-NAS, whose ``anchors`` are then the places of its candidates, and not kept.
        total: float32 [B]; not finite when anything of that image's output is not.
    """

    anchors: NDArray[np.int32]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]
    box_std: NDArray[np.float32] | None
    entropy: NDArray[np.float32] | None
    total: NDArray[np.float32]


# Outputs of an exported graph, in this order; RAW follows, so that the graph can be cut there.
OUTPUTS = tuple(field.name for field in fields(Selected))
RAW = ("logits", "distri")


def detections_from_selected(
    selected: Selected, *, keep: Sequence[int], rules: NmsRules
) -> list[Detections]:
    """Detections image by image.

    Args:
        selected: all arrays may be views of memory that the next batch overwrites.
        keep: class ids that may be detected.
    """
    allowed = np.zeros(selected.scores.shape[2], bool)
    allowed[list(keep)] = True
    return [_detections(selected, i, allowed, rules) for i in range(len(selected.scores))]


def _detections(
    selected: Selected, image: int, allowed: NDArray[np.bool_], rules: NmsRules
) -> Detections:
    boxes, scores, anchors = (
        selected.boxes[image], selected.scores[image], selected.anchors[image]
    )  # fmt: skip
    # Rows first: most have no candidate, and their classes need not be looked at one by one.
    some = np.flatnonzero(scores.max(1) > rules.score_floor)
    rows, classes = np.nonzero((scores[some] > rules.score_floor) & allowed)
    rows = some[rows]
    found = scores[rows, classes]
    best = best_candidates(found, anchors[rows].astype(np.int64), classes)
    stay = best[suppress(boxes[rows[best]], found[best], classes[best], rules)]
    row = rows[stay]
    topk_ids, topk_scores = top_classes(scores[row])
    return Detections(
        boxes=boxes[row],
        scores=found[stay],
        category_ids=classes[stay].astype(np.int16),
        topk_ids=topk_ids,
        topk_scores=topk_scores,
        box_std=None if selected.box_std is None else selected.box_std[image][row],
        box_entropy=None if selected.entropy is None else selected.entropy[image][row],
        anchor=None if selected.box_std is None else anchors[row],
    )

"""COCO's matching in chunks of images, through faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from storage.boxes import clipped, has_area
from storage.records import Detections

_MAX_DETS_100 = 2  # index into COCO's maxDets of 1, 10, 100


class ChunkedMatching:
    """COCO's matching chunk by chunk, and its accumulation at the end: the same figures.

    Both halves are faster-coco-eval's; between them its per-image results, which it keeps in the
    order class, area range, image, are put together as if there had been one chunk.
    """

    def __init__(self, n_classes: int) -> None:
        self._categories = [{"id": k + 1, "name": str(k)} for k in range(n_classes)]
        self._chunks: list[tuple[int, list[Any]]] = []
        self._last: COCOeval_faster | None = None

    def add(
        self, n_images: int, truth: list[dict[str, Any]], detections: NDArray[np.float64]
    ) -> None:
        """One chunk.

        Args:
            n_images: how many images, with ids 1 to ``n_images``.
            truth: COCO annotations without an ``id``; category ids from 1.
            detections: float64 [N, 7]: image id, x, y, w, h, score, category id.
        """
        # Id 0 would mean "unmatched" to the matcher.
        annotations = [{"id": i, **box} for i, box in enumerate(truth, 1)]
        images = [{"id": i} for i in range(1, n_images + 1)]
        expected = COCO(
            {"images": images, "annotations": annotations, "categories": self._categories}
        )
        found = expected.loadRes(detections) if len(detections) else expected.loadRes([])
        self._last = COCOeval_faster(
            expected, found, "bbox", separate_eval=True, print_function=_say_nothing
        )
        self._last.evaluate()
        self._chunks.append((n_images, self._last._evalImgs_cpp))

    def curves(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision [IoU 10, recall 101, class, area 4] and recall [IoU 10, class, area 4]."""
        if self._last is None:
            raise ValueError("no chunk was added")
        n_cells = len(self._categories) * len(self._last.params.areaRngLbl)
        self._last._evalImgs_cpp = [
            one
            for cell in range(n_cells)
            for n, results in self._chunks
            for one in results[cell * n : (cell + 1) * n]
        ]
        total = sum(n for n, _ in self._chunks)
        self._last._paramsEval.imgIds = list(range(1, total + 1))
        self._last.accumulate()
        precision = np.asarray(self._last.eval["precision"])[..., _MAX_DETS_100]
        return precision, np.asarray(self._last.eval["recall"])[..., _MAX_DETS_100]


def detection_rows(
    number: int,
    found: Detections,
    size: tuple[int, int] | None,
    classes: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.float64]:
    """Return one image's detections as COCO takes them, clipped to the image.

    Args:
        number: the image's id in its chunk, from 1.
        found: its detections.
        size: (width, height) of the upright image; None: the boxes are clipped already.
        classes: class index of each box, from 0, negative: to be left out; None: the boxes' own
            category ids.

    Returns:
        float64 [N, 7]: image, x, y, w, h, score, class from 1. Boxes without area in the image
        are left out.
    """
    index = found.category_ids.astype(np.int64) if classes is None else classes
    boxes = found.boxes.astype(np.float64)
    if size is not None:
        boxes = clipped(boxes, *size)
    kept = has_area(boxes) & (index >= 0)
    rows = np.empty((int(kept.sum()), 7))
    rows[:, 0] = number
    rows[:, 1:3] = boxes[kept, :2]
    rows[:, 3:5] = boxes[kept, 2:] - boxes[kept, :2]
    rows[:, 5], rows[:, 6] = found.scores[kept], index[kept] + 1
    return rows


def truth_box(
    index: int, xywh: Sequence[float], area: float, *, ignore: bool, number: int = 1
) -> dict[str, Any]:
    """Return one true box as COCO takes it.

    Args:
        index: its class, from 0.
        xywh: x, y, width, height in pixels.
        area: in pixels; decides its size range.
        ignore: it counts neither way, as a crowd.
        number: the image's id in its chunk, from 1.
    """
    return {
        "image_id": number,
        "category_id": index + 1,
        "bbox": list(xywh),
        "area": area,
        "iscrowd": int(ignore),
        "ignore": int(ignore),
    }


def _say_nothing(*_: object) -> None:
    """faster-coco-eval logs each step otherwise."""

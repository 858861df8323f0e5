"""Boxes of a label version as lines of COCO JSON, by way of records of 34 bytes.

The lines take twelve times as many bytes, so what has to wait waits as records.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.coco.json_text import (
    Texts,
    decimals,
    decimals_of,
    lines,
    rounded,
    steps_of,
    whole_numbers,
)

DIVIDED = ",\n"
# ``drawn``: a person drew it, and it has no score. ``image``: the image's number.
BOX = np.dtype(
    [
        ("corners", np.float32, 4),
        ("score", np.float32),
        ("image", np.int64),
        ("category_id", np.int16),
        ("origin", np.int16),
        ("ignore", np.bool_),
        ("drawn", np.bool_),
    ]
)
Boxes = NDArray[np.void]  # [N], of ``BOX``
_Parts = list[bytes | Texts]  # of lines: the same for all, or one for each
_MOST_STEPS = 10**12  # of an area, in thousandths: Python writes more with an exponent, some day


class BoxLines:
    """Makes records of boxes, and lines of the records that it made.

    Args:
        official: official category ids by category id.
    """

    def __init__(self, official: Sequence[int]) -> None:
        self._official = np.array([str(number) for number in official], np.bytes_)
        self._origins: dict[str, int] = {}

    def records(self, box: pa.StructArray, image: NDArray[np.int64]) -> Boxes:
        """Return boxes as records.

        Args:
            box: [N], in ``LABEL_TYPE``.
            image: [N], the numbers of their images.
        """
        made = np.empty(len(box), BOX)
        made["corners"] = np.asarray(box.field("bbox").flatten()).reshape(-1, 4)
        score, origin = box.field("score"), box.field("origin").dictionary_encode()
        made["score"] = np.nan_to_num(np.asarray(score, np.float32))
        made["drawn"] = np.asarray(score.is_null())
        made["image"] = image
        made["category_id"] = np.asarray(box.field("category_id"))
        known = [
            self._origins.setdefault(name, len(self._origins))
            for name in origin.dictionary.to_pylist()
        ]
        made["origin"] = np.array(known, np.int16).take(np.asarray(origin.indices))
        made["ignore"] = np.asarray(box.field("ignore"))
        return made

    def lines(self, boxes: Boxes, ids: NDArray[np.int64], *, outlined: bool) -> bytearray:
        """Return the JSON of boxes [N], each behind ``DIVIDED``.

        Args:
            boxes: some that ``records`` returned, at least one.
            ids: [N], the annotations' own numbers.
            outlined: with the box as a polygon.
        """
        x1, y1, x2, y2, width, height, area = _sides(np.ascontiguousarray(boxes["corners"]))
        # Clockwise from the top left.
        outline = [b', "segmentation": [[', *_listed(x1, y1, x2, y1, x2, y2, x1, y2), b"]]}"]
        return lines(
            [
                f'{DIVIDED}{{"id": '.encode(), *whole_numbers(ids),
                b', "image_id": ', *whole_numbers(boxes["image"]),
                b', "category_id": ', self._official.take(boxes["category_id"]),
                b', "bbox": [', *_listed(x1, y1, width, height), b'], "area": ', *area,
                b', "iscrowd": ', (boxes["ignore"].view(np.uint8) + ord("0")).view("S1"),
                b', "origin": ', self._said().take(boxes["origin"]),
                *_score(boxes), *(outline if outlined else [b"}"]),
            ]
        )  # fmt: skip

    def _said(self) -> Texts:
        return np.array([json.dumps(name) for name in self._origins], np.bytes_)


def _sides(corners: NDArray[np.float32]) -> Sequence[Sequence[Texts]]:
    """Return x1, y1, x2, y2, width, height and area of boxes [N, 4], each as parts of lines."""
    steps = steps_of(corners, 3)
    if steps is not None:
        sides = np.empty((6, len(steps)), np.int32)
        sides[:4] = steps.T
        np.subtract(sides[2:4], sides[:2], out=sides[4:])
        area = _area(sides[4], sides[5])
        if area is not None:
            return [*zip(*decimals_of(sides, 3), strict=True), decimals_of(area, 3)]
    exact = rounded(corners.reshape(-1), 3).reshape(-1, 4)
    width, height = (rounded(exact[:, n + 2] - exact[:, n], 3) for n in (0, 1))
    sizes = (width, height, rounded(width * height, 3))
    return [decimals(side, 3) for side in (*exact.T, *sizes)]


def _area(width: NDArray[np.int32], height: NDArray[np.int32]) -> NDArray[np.int64] | None:
    """Return ``round(width * height, 3)``, all in thousandths.

    None where a side is negative, or the rounding of the product, of a billion or more, as a
    float64 could decide.
    """
    if min(width.min(), height.min()) < 0:
        return None
    product = width.astype(np.int64) * height
    steps = product // 1000
    rest = product - 1000 * steps
    steps += rest > 500
    if steps.max() >= _MOST_STEPS:
        return None
    middle = rest == 500  # where Python's product may lie on either side
    if middle.any():
        exact = (width[middle] / 1000) * (height[middle] / 1000)
        steps[middle] = np.rint(1000 * rounded(exact, 3))
    return steps


def _listed(*numbers: Sequence[Texts]) -> _Parts:
    parts: _Parts = []
    for number in numbers:
        parts += [b", ", *number] if parts else [*number]
    return parts


def _score(boxes: Boxes) -> _Parts:
    """[N]; nothing where a person drew the box."""
    drawn, score = boxes["drawn"], boxes["score"]
    steps = steps_of(score, 6)
    known = decimals(rounded(score, 6), 6) if steps is None else decimals_of(steps, 6)
    if not drawn.any():
        return [b', "score": ', *known]
    parts = [np.full(len(score), b', "score": '), *known]
    for part in parts:
        part[drawn] = b""
    return list(parts)

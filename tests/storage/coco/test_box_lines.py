"""Lines of boxes against ``json.dumps`` of each box."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.coco.box_lines import DIVIDED, BoxLines
from storage.labels.rows import Label
from storage.labels.versions import LABEL_TYPE

OFFICIAL = (7, 1, 90)
ORIGINS = ("model", "kept", "moved", 'ä "new" one')
# Quarters and 500ths make areas that lie in the middle between two thousandths.
SIDES = st.one_of(
    st.floats(0, 1e5, width=32),
    st.integers(0, 40_000).map(lambda n: n / 4),
    st.integers(0, 10**6).map(lambda n: float(np.float32(n / 500))),
    st.sampled_from([0.0, 0.0005, 0.001, 9_999.9995, 1e4]),
)
ODD = st.one_of(SIDES, st.floats(-1e9, 1e9, width=32), st.sampled_from([-0.0, 2_147_483.75]))
SCORES = st.one_of(st.none(), st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 9.9e-5]))


def labels_of(sides: st.SearchStrategy[float]) -> st.SearchStrategy[list[Label]]:
    """Boxes with their corners in order, where the sides are not negative."""
    corners = st.tuples(sides, sides, sides, sides).map(
        lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
    )
    made = st.builds(
        Label, corners, st.integers(0, 2), SCORES, st.booleans(), st.sampled_from(ORIGINS)
    )
    return st.lists(made, min_size=1, max_size=20)


@given(labels_of(SIDES), st.integers(1, 10**9))
@example([Label((0, 0, 0.5, 0.25), 0, None, False, "added")], 9_999)
@example([Label((0.25, 0.25, 10.5, 100.75), 2, 1.0, True, "model")] * 2, 10**8 - 1)
def test_lines_are_what_json_writes(labels: list[Label], first: int) -> None:
    check(labels, first)


@given(labels_of(ODD), st.integers(1, 10**9))
@example([Label((0, 0, 4e4, 4e4), 0, 0.5, False, "model")], 1)  # an area of more than 1e9
@example([Label((5, 5, 1, 1), 0, 0.5, False, "model")], 1)  # corners in no order
@example([Label((0, 0, 1e20, 1e20), 0, 0.5, False, "model")], 1)
def test_so_are_those_of_boxes_that_no_image_has(labels: list[Label], first: int) -> None:
    check(labels, first)


@pytest.mark.parametrize("outlined", [True, False])
def test_records_of_several_calls_may_be_written_together(outlined: bool) -> None:
    text = BoxLines(OFFICIAL)
    labels = [Label((1, 2, 3.5, 4), n % 3, n / 10, n % 2 == 0, ORIGINS[n % 4]) for n in range(8)]
    boxes = np.concatenate(
        [text.records(arrow(part), np.full(4, 5)) for part in (labels[:4], labels[4:])]
    )
    found = text.lines(boxes[boxes["ignore"]], np.arange(1, 5), outlined=outlined)
    wanted = [line(n, 5, one, outlined) for n, one in enumerate(labels[::2], 1)]
    assert found.decode() == "".join(wanted)


def check(labels: list[Label], first: int) -> None:
    text = BoxLines(OFFICIAL)
    images = np.arange(len(labels)) * 20_000 + 1
    boxes = text.records(arrow(labels), images)
    ids = np.arange(first, first + len(labels))
    for outlined in (True, False):
        wanted = [
            line(number, image, label, outlined)
            for number, image, label in zip(ids.tolist(), images.tolist(), labels, strict=True)
        ]
        assert text.lines(boxes, ids, outlined=outlined).decode() == "".join(wanted)


def arrow(labels: list[Label]) -> pa.StructArray:
    said = [
        {"bbox": one.bbox, "category_id": one.category_id, "score": one.score,
         "ignore": one.ignore, "origin": one.origin}
        for one in labels
    ]  # fmt: skip
    return pa.array(said, LABEL_TYPE)


def line(number: int, image: int, label: Label, outlined: bool) -> str:
    x1, y1, x2, y2 = (round(float(np.float32(side)), 3) for side in label.bbox)
    width, height = round(x2 - x1, 3), round(y2 - y1, 3)
    made: dict[str, Any] = {
        "id": number,
        "image_id": image,
        "category_id": OFFICIAL[label.category_id],
        "bbox": [x1, y1, width, height],
        "area": round(width * height, 3),
        "iscrowd": int(label.ignore),
        "origin": label.origin,
    }
    if label.score is not None:
        made["score"] = round(float(np.float32(label.score)), 6)
    if outlined:
        made["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return DIVIDED + json.dumps(made)

"""Boxes to Label Studio's percent and back, and what became of them."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.label_studio.answers import compare, prediction_shown
from pipelines.label_studio.interface import Interface, interface_of, label_config
from pipelines.label_studio.regions import Region, ShownBox, clip, from_results, to_result
from storage.errors import ReviewError

SIDE = st.integers(1, 4000)


@given(st.data(), SIDE, SIDE)
def test_boxes_inside_an_image_come_back_as_they_were(data: Any, width: int, height: int) -> None:
    x1 = data.draw(st.floats(0, width - 0.5))
    y1 = data.draw(st.floats(0, height - 0.5))
    x2 = data.draw(st.floats(x1 + 0.25, width))
    y2 = data.draw(st.floats(y1 + 0.25, height))
    result = to_result(ShownBox("r", (x1, y1, x2, y2), "A", 0.5), width, height, Interface())
    assert result is not None
    (back,) = from_results([result], width, height)
    assert back.bbox == pytest.approx((x1, y1, x2, y2), abs=1e-6)
    assert (back.region, back.category, back.score) == ("r", "A", 0.5)


BOX = st.tuples(*[st.floats(-500, 1500)] * 4)


@given(BOX)
def test_what_is_shown_lies_within_the_image(box: tuple[float, float, float, float]) -> None:
    (x1, x2), (y1, y2) = sorted((box[0], box[2])), sorted((box[1], box[3]))
    result = to_result(ShownBox("r", (x1, y1, x2, y2), "A", 0.5), 640, 480, Interface())
    if result is None:
        assert clip((x1, y1, x2, y2), 640, 480) is None
        return
    value = result["value"]
    assert value["x"] >= 0
    assert value["y"] >= 0
    assert value["width"] > 0
    assert value["height"] > 0
    assert value["x"] + value["width"] <= 100 + 1e-9
    assert value["y"] + value["height"] <= 100 + 1e-9


def test_a_turned_box_becomes_its_upright_hull() -> None:
    """Turned by 90 degrees clockwise about its left top corner, it lies to the left of it."""
    value = {"x": 50, "y": 50, "width": 20, "height": 10, "rotation": 90,
             "rectanglelabels": ["A"]}  # fmt: skip
    (region,) = from_results([{"id": "r", "type": "rectanglelabels", "value": value}], 100, 100)
    assert region.bbox == pytest.approx((40, 50, 50, 70))
    value["rotation"] = 45
    (region,) = from_results([{"id": "r", "type": "rectanglelabels", "value": value}], 100, 100)
    half = math.sqrt(0.5)
    assert region.bbox == pytest.approx((50 - 10 * half, 50, 50 + 20 * half, 50 + 30 * half))


def region(name: str, x: float = 0.0, category: str = "A", score: float | None = None) -> Region:
    return Region(name, (x, 0.0, x + 10, 10.0), category, score)


def test_every_shown_box_is_accounted_for() -> None:
    shown = [region(f"r{i}", 20 * i, score=0.1 * i) for i in range(5)]
    left = [
        region("r0", 0.3),  # half a pixel is a page's rounding, not a move
        region("r1", 25),
        region("r2", 40, "B"),
        region("new", 200),
        region("bare", 300, ""),
    ]
    boxes, deleted = compare(shown, left)
    assert [b.origin for b in boxes] == ["kept", "moved", "relabelled", "added"]
    assert [b.score for b in boxes] == [0.0, 0.1, 0.2, None]
    assert [d.score for d in deleted] == [pytest.approx(0.3), 0.4]


def test_the_prediction_is_the_one_the_page_names_else_the_one_that_shares_most() -> None:
    predictions = [
        {"id": 1, "result": [{"id": "a"}, {"id": "b"}]},
        {"id": 2, "result": [{"id": "a"}]},
    ]
    named = prediction_shown(predictions, {"parent_prediction": 2, "result": [{"id": "b"}]})
    assert named == predictions[1]
    shared = prediction_shown(predictions, {"result": [{"id": "a"}, {"id": "b"}]})
    assert shared == predictions[0]
    assert prediction_shown([], {"result": []}) is None


def test_an_interface_escapes_what_people_call_their_classes() -> None:
    made = label_config(["a<b>", 'q"q', "ü & co", *map(str, range(12))])
    assert "a&lt;b&gt;" in made
    assert "ü &amp; co" in made
    assert made.count("hotkey=") == 10


HOSTILE_CLASS = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=40)


@given(st.lists(HOSTILE_CLASS | st.sampled_from(['"/><Text value="$x', "]]>", "&lt;"]), max_size=5))
def test_an_interface_holds_the_classes_and_nothing_else(classes: list[str]) -> None:
    root = ElementTree.fromstring(label_config(classes))
    assert [tag.tag for tag in root.iter()] == [
        "View", "Image", "RectangleLabels", *["Label"] * len(classes),
    ]  # fmt: skip
    assert [tag.get("value") for tag in root.iter("Label")] == classes


def test_a_class_that_no_interface_can_hold_is_refused_in_words() -> None:
    for name in ("a\x1b[31m", "\0", "a\x07"):
        with pytest.raises(ReviewError, match="cannot be a label"):
            label_config(["RBC", name])


def test_an_interface_without_rectangles_is_refused_with_one_to_paste() -> None:
    with pytest.raises(ReviewError) as caught:
        interface_of({"choice": {"type": "Choices"}}, ["RBC"])
    assert '<Label value="RBC"' in str(caught.value.hint)

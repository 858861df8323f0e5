"""Boxes to Label Studio's percent and back, and what became of them."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.label_studio.answers import compare, prediction_shown, to_answer
from pipelines.label_studio.interface import Interface, hotkeys, interface_of, label_config
from pipelines.label_studio.regions import Drawn, Region, ShownBox, clip, read_results, to_result
from pipelines.review.tasks import queued
from storage.errors import ReviewError
from storage.stores.memory import MemoryStore
from tests.support.samples.review_samples import loose_run, routed

SIDE = st.integers(1, 4000)


@given(st.data(), SIDE, SIDE)
def test_boxes_inside_an_image_come_back_as_they_were(data: Any, width: int, height: int) -> None:
    x1 = data.draw(st.floats(0, width - 0.5))
    y1 = data.draw(st.floats(0, height - 0.5))
    x2 = data.draw(st.floats(x1 + 0.25, width))
    y2 = data.draw(st.floats(y1 + 0.25, height))
    result = to_result(ShownBox("r", (x1, y1, x2, y2), "A", 0.5), width, height, Interface())
    assert result is not None
    (back,) = read_results([result], width, height).regions
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


def only(*results: dict[str, Any], size: tuple[int, int] = (100, 100)) -> Region:
    """The one region that the results describe, with nothing left over."""
    drawn = read_results(results, *size)
    assert (len(drawn.regions), drawn.unusable, drawn.flat) == (1, (), 0)
    return drawn.regions[0]


def test_a_turned_box_becomes_its_upright_hull() -> None:
    """Turned by 90 degrees clockwise about its left top corner, it lies to the left of it."""
    value = {"x": 50, "y": 50, "width": 20, "height": 10, "rotation": 90,
             "rectanglelabels": ["A"]}  # fmt: skip
    region = only({"id": "r", "type": "rectanglelabels", "value": value})
    assert region.bbox == pytest.approx((40, 50, 50, 70))
    value["rotation"] = 45
    region = only({"id": "r", "type": "rectanglelabels", "value": value})
    half = math.sqrt(0.5)
    assert region.bbox == pytest.approx((50 - 10 * half, 50, 50 + 20 * half, 50 + 30 * half))


def shape(kind: str, label: str = "A", **value: Any) -> dict[str, Any]:
    return {"id": "r", "type": f"{kind}labels", "value": {**value, f"{kind}labels": [label]}}


def test_other_shapes_become_their_upright_hulls() -> None:
    polygon = shape("polygon", points=[[10, 10], [50, 20], [30, 60]], closed=True)
    assert only(polygon, size=(200, 100)).bbox == pytest.approx((20, 10, 100, 60))
    ellipse = shape("ellipse", x=50, y=50, radiusX=20, radiusY=10, rotation=0)
    assert only(ellipse, size=(200, 100)).bbox == pytest.approx((60, 40, 140, 60))
    turned = shape("ellipse", x=50, y=50, radiusX=20, radiusY=10, rotation=90)
    assert only(turned).bbox == pytest.approx((40, 30, 60, 70))


@pytest.mark.slow
def test_masks_become_their_upright_hulls() -> None:
    from label_studio_sdk.converter.brush import mask2rle

    mask = np.zeros((60, 80), np.uint8)
    mask[10:31, 20:51] = 255
    brush = shape("brush", format="rle", rle=mask2rle(mask))
    brush |= {"original_width": 80, "original_height": 60}
    assert only(brush, size=(80, 60)).bbox == (20, 10, 51, 31)
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    assert only(shape("bitmask", imageDataURL=url), size=(160, 120)).bbox == (40, 20, 102, 62)


def test_a_mask_that_would_fill_the_memory_is_refused() -> None:
    brush = shape("brush", format="rle", rle=[255] * 64)
    for size in (80, 10**6):
        brush |= {"original_width": size, "original_height": size}
        with pytest.raises(ValueError, match="mask"):
            read_results([brush], 80, 80)


def test_a_shape_and_its_label_may_come_from_two_controls() -> None:
    place = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0}
    plain = {"id": "r", "type": "rectangle", "value": place}
    labels = {"id": "r", "type": "labels", "value": {**place, "labels": ["B"]}}
    remark = {"id": "r", "type": "choices", "value": {**place, "choices": ["blurred"]}}
    assert only(plain, labels, remark).category == "B"


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (shape("keypoint", x=1, y=2, width=0.1), "keypointlabels"),
        (shape("vector", vertices=[{"x": 1, "y": 2}]), "vectorlabels"),
        ({"id": "r", "type": "rectanglelabels",
          "value": {"x": 1, "y": 1, "width": 5, "height": 5}}, "rectanglelabels without a label"),
        ({"id": "r", "type": "rectanglelabels",
          "value": {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": ["A", "B"]}},
         "2 labels on one region"),
        ({"id": "r", "type": "choices", "value": {"choices": ["unsharp"]}}, "choices"),
    ],
)  # fmt: skip
def test_what_cannot_become_a_box_is_named(result: dict[str, Any], kind: str) -> None:
    assert read_results([result], 100, 100) == Drawn((), (kind,), 0)


def test_remarks_beside_boxes_do_no_harm_and_shapes_without_area_are_left_out() -> None:
    box = shape("rectangle", x=1, y=1, width=5, height=5)
    flat = {**shape("rectangle", x=1, y=1, width=0, height=5), "id": "flat"}
    line = {**shape("polygon", points=[[1, 1], [9, 9]]), "id": "line"}
    remark = {"id": "q", "type": "choices", "value": {"choices": ["unsharp"]}}
    drawn = read_results([box, flat, line, remark], 100, 100)
    assert (len(drawn.regions), drawn.unusable, drawn.flat) == (1, (), 2)


def region(name: str, x: float = 0.0, category: str = "A", score: float | None = None) -> Region:
    return Region(name, (x, 0.0, x + 10, 10.0), category, score)


def test_every_shown_box_is_accounted_for() -> None:
    shown = [region(f"r{i}", 20 * i, score=0.1 * i) for i in range(5)]
    left = [
        region("r0", 0.3),  # half a pixel is a page's rounding, not a move
        region("r1", 25),
        region("r2", 40, "B"),
        region("new", 200),
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


def test_what_a_person_saw_was_there_when_they_began() -> None:
    old = {"id": 1, "created_at": "2026-01-01T10:00:00Z", "result": [{"id": "a"}]}
    new = {"id": 2, "created_at": "2026-01-01T12:00:00Z", "result": [{"id": "b"}]}
    began = {"created_at": "2026-01-01T11:00:00.5Z", "result": []}
    assert prediction_shown([old, new], began) == old
    assert prediction_shown([new], began) is None
    copy = {**old, "id": 3, "model_version": "the next round"}
    assert prediction_shown([old, copy], {**began, "created_at": "2026-01-02T00:00:00Z"}) == old


def rectangle(number: int, x: float) -> dict[str, Any]:
    value = {"x": x, "y": 0, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": ["RBC"]}
    return {
        "id": f"box{number}", "type": "rectanglelabels", "from_name": "label", "to_name": "image",
        "original_width": 100, "original_height": 100, "value": value,
    }  # fmt: skip


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("left", [(0,), ()])
def test_boxes_of_a_prediction_that_replaced_the_shown_one_were_not_deleted(
    replaced: bool, left: tuple[int, ...]
) -> None:
    """Prediction 9 took the place of 5, with one box more, while the task was open."""
    routed_run = routed(loose_run(MemoryStore(), MemoryStore(), 1))
    item = dataclasses.replace(queued(routed_run)[0].item, width=100, height=100)
    boxes = [rectangle(0, 0), rectangle(1, 60)]
    task = {
        "id": 1,
        "predictions": [{"id": 9, "created_at": "2026-01-01T10:05:00Z", "result": boxes}],
    }
    annotation = {
        "id": 7, "completed_by": 1, "parent_prediction": 5 if replaced else 9,
        "created_at": "2026-01-01T10:10:00Z", "updated_at": "2026-01-01T10:10:00Z",
        "result": [boxes[number] for number in left],
    }  # fmt: skip
    made = to_answer(task, annotation, item, {1: "anna"})
    corners = [(0.0, 0.0, 20.0, 20.0), (60.0, 0.0, 80.0, 20.0)]
    assert not made.was_blind
    assert [box.origin for box in made.boxes] == ["kept"] * len(left)
    assert list(made.shown) == (corners[: len(left)] if replaced else corners)
    assert [box.bbox for box in made.deleted] == ([] if replaced else corners[len(left) :])
    nothing_left = to_answer({**task, "predictions": []}, annotation, item, {1: "anna"})
    assert (nothing_left.was_blind, nothing_left.shown) == (False, ())


def test_an_interface_escapes_what_people_call_their_classes() -> None:
    made = label_config(["a<b>", 'q"q', "ü & co", *map(str, range(12))])
    assert "a&lt;b&gt;" in made
    assert "ü &amp; co" in made
    assert made.count("<Label ") == 15
    assert sum("hotkey=" in line for line in made.splitlines() if "<Label " in line) == 10


def test_the_page_says_why_only_where_that_was_asked_for() -> None:
    assert "why" not in label_config(["RBC"])
    root = ElementTree.fromstring(label_config(["RBC"], show_why=True))
    (header,) = root.iter("Header")
    assert header.get("value") == "$why"


def test_hotkeys_match_the_digits_in_the_names() -> None:
    digits = [f"Digit{i}" for i in range(10)]
    assert hotkeys(digits) == {f"Digit{i}": str(i) for i in range(10)}
    assert hotkeys(["cat", "7", "dog", "type 12"]) == {
        "7": "7", "cat": "1", "dog": "2", "type 12": "3"
    }  # fmt: skip
    assert hotkeys(["a1", "b1"]) == {"a1": "1", "b1": "2"}


def test_many_classes_have_a_filter_and_a_colour_each() -> None:
    many = [f"class {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(80)]
    root = ElementTree.fromstring(label_config(many))
    (search,) = root.iter("Filter")
    assert search.get("toName") == "label"
    colours = [tag.get("background") for tag in root.iter("Label")]
    assert len(set(colours)) == 80
    assert not list(ElementTree.fromstring(label_config(many[:10])).iter("Filter"))


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

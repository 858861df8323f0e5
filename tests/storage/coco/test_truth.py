"""COCO files as they come: understood where they are unmistakable, refused by entry where not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from storage.coco.truth import Truth, parse_truth
from storage.errors import ConfigError

IMAGES = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}]


def parse(
    *annotations: dict[str, Any],
    categories: list[dict[str, Any]] | None = None,
    images: list[dict[str, Any]] | None = None,
    **more: Any,
) -> Truth:
    coco = {
        "images": IMAGES if images is None else images,
        "categories": [{"id": 0, "name": "cell"}] if categories is None else categories,
        "annotations": [{"id": 7 + n, **one} for n, one in enumerate(annotations)],
        **more,
    }
    return parse_truth(json.dumps(coco).encode(), "t.json")


def box(**changes: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 0, "bbox": [10, 20, 30, 40]} | changes


def roboflow(*names: str) -> list[dict[str, Any]]:
    """Categories as Roboflow exports them: a root, then the classes below it."""
    root = {"id": 0, "name": names[0], "supercategory": "none"}
    rest = [{"id": n, "name": name, "supercategory": names[0]} for n, name in enumerate(names, 1)]
    return [root, *rest]


def test_roboflows_root_is_not_a_class_even_where_it_shares_a_name() -> None:
    found = parse(box(category_id=1), box(category_id=2), categories=roboflow("cells", "wbc"))
    assert found.categories == {1: "cells", 2: "wbc"}
    assert [b.category_id for b in found.boxes[0]] == [1, 2]


def test_a_root_that_annotations_use_is_a_class_and_its_double_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"categories 0 and 1 are both named 'cells'.*supercat"):
        parse(box(category_id=0), box(category_id=1), categories=roboflow("cells", "wbc"))


def test_equal_categories_become_one_under_the_first_id() -> None:
    twice = [{"id": 3, "name": "cell", "supercategory": ""}, {"id": 5, "name": "cell"}]
    found = parse(box(category_id=3), box(category_id=5), categories=twice)
    assert found.categories == {3: "cell"}
    assert [b.category_id for b in found.boxes[0]] == [3, 3]


def test_names_of_classes_are_compared_in_one_unicode_form() -> None:
    found = parse(
        box(category_id=1), box(category_id=2),
        categories=[{"id": 1, "name": "Bl\u00e4tter"}, {"id": 2, "name": "Bla\u0308tter"}],
    )  # fmt: skip
    assert found.categories == {1: "Bl\u00e4tter"}


@pytest.mark.parametrize(
    ("written", "ignored"),
    [("0", False), ("false", False), ("False", False), ("", False), (None, False), (0.0, False),
     ("1", True), ("true", True), (True, True), (1, True)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_flags_as_text_mean_what_they_say(key: str, written: Any, ignored: bool) -> None:
    assert parse(box(**{key: written})).boxes[0][0].ignore is ignored


def test_numbers_as_text_are_numbers() -> None:
    found = parse(
        box(image_id="1", category_id="0", bbox=["10", "20.5", 30, 40], area="900"),
        images=[{"id": 1.0, "file_name": "a.jpg", "width": "100", "height": 80.0}],
    )
    one = found.boxes[0][0]
    assert (one.xywh, one.area, one.category_id) == ((10, 20.5, 30, 40), 900, 0)
    assert (found.images[0].width, found.images[0].height) == (100, 80)


@pytest.mark.parametrize("area", [None, 0, "0", 1200])
def test_an_area_that_is_missing_is_the_boxs(area: Any) -> None:
    assert parse(box(area=area)).boxes[0][0].area == 1200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bbox": None}, r"annotations\[0\] \(id 7\): bbox is null"),
        ({"bbox": [1, 2, float("nan"), 4]}, r"\(id 7\): bbox holds nan, not a finite number"),
        ({"bbox": [1, 2, "wide", 4]}, r"\(id 7\): bbox holds 'wide', not a number"),
        ({"area": -5}, r"\(id 7\): area is -5; it cannot be negative"),
        ({"area": float("inf")}, r"\(id 7\): area holds inf"),
        ({"iscrowd": 2}, r"\(id 7\): iscrowd is 2, neither 0 nor 1"),
        ({"ignore": "perhaps"}, r"\(id 7\): ignore is 'perhaps', neither 0 nor 1"),
        ({"category_id": "cell"}, r"\(id 7\): category_id is 'cell', not a whole number"),
        ({"image_id": None}, r"\(id 7\): image_id is null"),
    ],
)
def test_what_cannot_be_told_is_refused_by_annotation(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(box(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"file_name": None}, r"images\[0\] \(id 1\): file_name is null"),
        ({"file_name": 5}, r"file_name is 5, not a name"),
        ({"width": "wide"}, r"images\[0\] \(id 1\): width holds 'wide'"),
        ({"height": -1}, r"height is -1, not a number of pixels"),
    ],
)
def test_what_cannot_be_told_is_refused_by_image(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(images=[IMAGES[0] | changes])


def test_a_missing_bbox_and_a_list_of_text_are_named() -> None:
    with pytest.raises(ConfigError, match=r"annotations\[0\] \(id 7\): bbox is missing"):
        parse({"image_id": 1, "category_id": 0})
    with pytest.raises(ConfigError, match=r"images\[1\] is 'a.jpg', not an object"):
        parse(images=[IMAGES[0], "a.jpg"])  # type: ignore[list-item]


def test_corners_and_shares_are_recognised() -> None:
    corners = [box(bbox=[50 + n, 40, 90, 70]) for n in range(5)]
    with pytest.raises(ConfigError, match=r"5 of 5 boxes reach beyond .* \[x1, y1, x2, y2\]"):
        parse(*corners)
    with pytest.raises(ConfigError, match="shares of the image"):
        parse(box(bbox=[0.1, 0.2, 0.3, 0.4]), box(bbox=[0, 0, 1, 1]))


def test_boxes_that_reach_a_little_beyond_the_border_are_read() -> None:
    assert len(parse(box(bbox=[50, 30, 52, 52]), box(bbox=[0, 0, 1, 1])).boxes[0]) == 2


def test_boxes_without_area_are_counted_and_left_out() -> None:
    found = parse(box(bbox=[1, 2, 0, 4]), box())
    assert (found.without_area, len(found.boxes[0])) == (1, 1)


def test_the_list_ignore_adds_what_is_not_a_crowd_already() -> None:
    found = parse(
        box(iscrowd=1),
        ignore=[{"image_id": 1, "bbox": [10, 20, 30, 40]}, {"image_id": 1, "bbox": [1, 1, 5, 5]}],
    )
    assert found.regions_of(0) == ((1, 1, 5, 5),)

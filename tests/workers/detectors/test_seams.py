"""Tiles lie where SAHI cuts, and merging is SAHI's own; what a seam cuts becomes one box again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.truth.matching import iou_matrix
from storage.records import Detections
from workers.detectors.seams import merged, merged_windows
from workers.images.preprocessing import Tiles, Window

FIXTURES: dict[str, Any] = json.loads((Path(__file__).parent / "sahi.json").read_text())


def found(boxes: Any, scores: Any, classes: Any = None, first: int = 0) -> Detections:
    """Detections whose spread, entropy and anchor say which box they came from."""
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    n = len(corners)
    number = np.arange(first, first + n, dtype=np.float32)
    ids = np.zeros(n, np.int16) if classes is None else np.array(classes, np.int16)
    return Detections(
        boxes=corners,
        scores=np.array(scores, np.float32).reshape(n),
        category_ids=ids,
        topk_ids=np.stack([ids, 1 - ids], 1) if n else np.zeros((0, 2), np.int16),
        topk_scores=np.tile(np.array(scores, np.float32).reshape(n, 1), 2),
        box_std=number[:, None] + np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        box_entropy=number,
        anchor=number.astype(np.int32),
    )


@pytest.mark.parametrize("case", FIXTURES["merging"])
def test_merging_is_sahis(case: dict[str, Any]) -> None:
    got = merged(found(case["boxes"], case["scores"], case["classes"]))
    order = np.argsort(-got.scores)
    rows = np.column_stack([got.boxes, got.scores, got.category_ids])[order]
    np.testing.assert_allclose(rows, np.array(case["merged"]), atol=1e-4)


@pytest.mark.parametrize("case", FIXTURES["slices"])
def test_tiles_lie_where_sahi_cuts(case: dict[str, Any]) -> None:
    width, height = case["width"], case["height"]
    tiles = Tiles(case["size"], case["overlap"], whole=False)
    got = [(w.x, w.y, w.x + w.width, w.y + w.height) for w in tiles.windows(width, height)]
    assert got == [tuple(window) for window in case["windows"]]


def test_every_pixel_lies_in_a_tile() -> None:
    seen: NDArray[np.bool_] = np.zeros((1501, 2222), np.bool_)
    windows = Tiles(400, 0.25).windows(2222, 1501)
    assert windows[-1] == Window(0, 0, 2222, 1501)
    for window in windows[:-1]:
        assert (window.width, window.height) == (400, 400)
        seen[window.y : window.y + 400, window.x : window.x + 400] = True
    assert seen.all()
    assert Tiles(400).windows(400, 399) == [Window(0, 0, 400, 399)]


LEFT, RIGHT = Window(0, 0, 100, 100), Window(80, 0, 100, 100)


def test_an_object_cut_by_a_seam_is_one_box_with_the_sides_of_its_pieces() -> None:
    left = found([[60, 20, 100, 60]], [0.9])  # its right side is the tile's edge
    right = found([[0, 20, 40, 60]], [0.6], first=1)  # 80 to 120 in the image
    got = merged_windows([left, right], [LEFT, RIGHT], 180, 100)
    assert got.boxes.tolist() == [[60, 20, 120, 60]]
    assert got.scores.tolist() == pytest.approx([0.9])
    assert got.anchor is not None
    assert got.anchor.tolist() == [0]
    assert got.box_std is not None  # the right side's spread is that of the right piece
    np.testing.assert_allclose(got.box_std, [[0.1, 0.2, 1.3, 0.4]], rtol=1e-6)
    assert got.topk_ids.tolist() == [[0, 1]]


def test_what_no_seam_cut_is_not_swallowed() -> None:
    """A small object on a large one, both whole in a window; and two in one window."""
    large = found([[10, 10, 90, 90]], [0.9])
    small = found([[20, 20, 30, 30], [21, 21, 31, 31]], [0.8, 0.7], first=1)
    windows = [Window(0, 0, 100, 100)] * 2
    got = merged_windows([large, small], windows, 100, 100)
    assert got.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_duplicates_in_the_overlap_are_one_and_classes_stay_apart() -> None:
    left = found([[82, 40, 94, 52], [82, 40, 94, 52]], [0.9, 0.5], [0, 1])
    right = found([[2, 40, 14, 52]], [0.8], first=2)
    got = merged_windows([left, right], [LEFT, RIGHT], 180, 100)
    assert got.category_ids.tolist() == [0, 1]
    assert got.boxes.tolist() == [[82, 40, 94, 52]] * 2


def seen_in(
    objects: NDArray[np.float32], window: Window, score: float, jitter: float = 0.0, seed: int = 0
) -> Detections:
    """What a perfect detector says of a window: objects, and pieces of those that it cuts."""
    low, high = [window.x, window.y], [window.x + window.width, window.y + window.height]
    boxes = np.clip(objects, [*low, *low], [*high, *high])
    shared = np.prod(boxes[:, 2:] - boxes[:, :2], 1) / np.prod(objects[:, 2:] - objects[:, :2], 1)
    boxes = boxes[shared > 0.2] - np.array([*low, *low])
    boxes += np.random.default_rng(seed).uniform(-jitter, jitter, boxes.shape)
    return found(boxes, np.full(len(boxes), score))


@given(st.integers(0, 10_000), st.booleans())
def test_each_object_that_fits_the_overlap_is_one_box_as_a_tile_saw_it(
    seed: int, whole: bool
) -> None:
    """Also where the whole image, seen smaller, gives a higher score to a less exact box."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(10 * 8)[:40]  # cells of 40 pixels: no two objects touch
    corners = np.stack([places % 10 * 40, places // 10 * 40], 1) + rng.uniform(1, 15, (40, 2))
    objects = np.concatenate([corners, corners + rng.uniform(8, 24, (40, 2))], 1).astype(np.float32)
    windows = Tiles(100, 0.3, whole).windows(400, 320)
    parts = [seen_in(objects, window, 0.8) for window in windows]
    if whole:
        parts[-1] = seen_in(objects, windows[-1], 0.95, jitter=2, seed=seed)
    got = merged_windows(parts, windows, 400, 320)
    assert len(got) == len(objects)
    by_place = [np.abs(got.boxes - one).max(axis=1).min() for one in objects]
    assert max(by_place) < 1e-3


def test_the_whole_image_speaks_for_what_no_tile_holds_and_for_nothing_else() -> None:
    windows = Tiles(100, 0.2).windows(180, 100)
    large, small, unseen = [20, 10, 160, 90], [5, 5, 15, 15], [120, 40, 130, 50]
    nothing = found([], [])
    seen = [found([small], [0.6]), nothing, found([large, small, unseen], [0.5, 0.9, 0.7], first=1)]
    got = merged_windows(seen, windows, 180, 100)
    assert got.boxes.tolist() == [small, large]
    assert got.scores.tolist() == pytest.approx([0.6, 0.5])  # the tile's word on the small one


@given(st.integers(0, 10_000))
def test_no_two_windows_leave_duplicates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    windows = Tiles(100, 0.3).windows(180, 180)
    parts, at = [], 0
    for window in windows:
        corners = rng.uniform(0, [window.width - 30, window.height - 30], (12, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 30, (12, 2))], 1)
        parts.append(found(boxes, rng.uniform(0.1, 1, 12), rng.integers(0, 2, 12), first=at))
        at += 12
    got = merged_windows(parts, windows, 180, 180)
    assert got.anchor is not None
    part = got.anchor // 12
    iou = iou_matrix(got.boxes, got.boxes)
    same = got.category_ids[:, None] == got.category_ids
    assert not ((iou > 0.5 + 1e-6) & same & (part[:, None] != part)).any()
    assert (np.diff(got.scores) <= 0).all()


def test_nothing_found_and_families_without_spread() -> None:
    none = Detections.empty(2)
    assert len(merged_windows([none, none], [LEFT, RIGHT], 180, 100)) == 0
    left = found([[60, 20, 100, 60]], [0.9])
    plain = Detections(
        left.boxes, left.scores, left.category_ids, left.topk_ids, left.topk_scores,
        None, None, None,
    )  # fmt: skip
    got = merged_windows([plain, plain], [LEFT, RIGHT], 180, 100)
    assert (got.box_std, got.anchor, len(got)) == (None, None, 2)

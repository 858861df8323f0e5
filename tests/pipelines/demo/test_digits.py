"""The demo's pages: the same for a seed, boxes tight on ink, no handwriting in two splits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.demo.digits import Pages, make_pages
from pipelines.demo.handwriting import SPLITS, Split, draw_page, load_samples
from pipelines.demo.oddities import BROKEN, ODD
from storage.errors import ConfigError, ImageError, TooLarge, Undecodable
from workers.images.decode import decode

MAX_PIXELS = 178_956_970
HOW: dict[str, Any] = {"images": 24, "seed": 1, "hard_share": 0.3}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return make_pages(tmp_path_factory.mktemp("pages"), **HOW)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(
    pages: Pages, tmp_path: Path
) -> None:
    again = make_pages(tmp_path / "again", **HOW)
    other = make_pages(tmp_path / "other", **{**HOW, "seed": 6})
    assert digest(pages.images) == digest(again.images)
    assert pages.truth.read_bytes() == again.truth.read_bytes()
    assert digest(pages.images) != digest(other.images)


@pytest.mark.slow
def test_making_them_again_leaves_the_files_as_they_are(pages: Pages) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in pages.images.iterdir()}
    make_pages(pages.images.parent, **HOW)
    assert {p.name: p.stat().st_mtime_ns for p in pages.images.iterdir()} == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"mine\.jpg"):
        make_pages(tmp_path, images=2)
    assert (tmp_path / "images" / "mine.jpg").read_bytes() == b"x"


def test_no_sample_of_handwriting_is_in_two_splits() -> None:
    from sklearn.datasets import load_digits

    indices = [i for split in SPLITS.values() for i in split]
    assert sorted(indices) == list(range(len(load_digits().target)))
    strokes: dict[Split, set[bytes]] = {
        s: {one.tobytes() for one in load_samples(s).strokes} for s in SPLITS
    }
    assert not strokes["train"] & strokes["unseen"]
    assert not strokes["val"] & strokes["unseen"]
    assert not strokes["train"] & strokes["val"]


def test_pages_draw_only_the_split_they_are_given() -> None:
    samples = load_samples("unseen")
    for seed in range(10):
        page = draw_page(samples, np.random.default_rng(seed), hard=seed % 2 == 1)
        assert len(page.sources) > 0
        assert np.array_equal(samples.labels[page.sources], page.labels)


def test_boxes_are_tight_around_ink_and_hardly_overlap() -> None:
    samples = load_samples("unseen")
    for seed in range(12):
        page = draw_page(samples, np.random.default_rng(seed))
        height, width = page.pixels.shape[:2]
        ground = np.median(page.pixels.astype(int).sum(axis=2))
        inked = page.pixels.astype(int).sum(axis=2) < ground - 110
        for x1, y1, x2, y2 in page.boxes.astype(int):
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            inside = inked[y1:y2, x1:x2]
            assert inside.mean() > 0.1
            # Each side of the box has ink within two pixels of it.
            assert inside[:2].any()
            assert inside[-2:].any()
            assert inside[:, :2].any()
            assert inside[:, -2:].any()


def test_truth_names_every_readable_file_once_with_its_upright_size(pages: Pages) -> None:
    truth = json.loads(pages.truth.read_text())
    names = [image["file_name"] for image in truth["images"]]
    on_disk = {p.name for p in pages.images.iterdir()}
    assert len(on_disk) == pages.files == HOW["images"]
    assert sorted(names) == sorted(on_disk - set(pages.broken))
    assert len(pages.broken) == len(BROKEN)
    assert len(pages.odd) == len(ODD)
    for image in truth["images"]:
        decoded = decode((pages.images / image["file_name"]).read_bytes(), max_pixels=MAX_PIXELS)
        assert decoded.pixels.shape == (image["height"], image["width"], 3), image
    assert len(truth["annotations"]) == pages.objects
    assert {a["category_id"] for a in truth["annotations"]} == set(range(10))


def test_plain_and_hard_truth_split_the_whole(pages: Pages) -> None:
    parts = [json.loads(p.read_text())["images"] for p in (pages.truth_plain, pages.truth_hard)]
    names = [image["file_name"] for part in parts for image in part]
    whole = [i["file_name"] for i in json.loads(pages.truth.read_text())["images"]]
    assert sorted(names) == sorted(whole)
    assert all(parts)
    assert {image["hard"] for image in parts[0]} == {False}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ODD))
def test_odd_files_show_the_page_upright(kind: str) -> None:
    rng = np.random.default_rng(3)
    pixels = draw_page(load_samples("unseen"), rng).pixels
    decoded = decode(ODD[kind][1](pixels), max_pixels=MAX_PIXELS)
    assert decoded.pixels.shape == pixels.shape
    grey, expected = decoded.pixels.mean(axis=2), pixels.mean(axis=2)
    assert np.corrcoef(grey.ravel(), expected.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_broken_files_are_refused_and_a_bomb_from_its_header(kind: str) -> None:
    pixels = draw_page(load_samples("unseen"), np.random.default_rng(3)).pixels
    data = BROKEN[kind][1](pixels)
    expected: type[ImageError] = TooLarge if kind == "huge_header" else Undecodable
    with pytest.raises(expected):
        decode(data, max_pixels=MAX_PIXELS)
    assert len(data) < 100_000

"""Ground truth: names join the right rows or none, and damaged files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.truth.coco_truth import Join, join_rows, match_categories, refuse_unmatched
from storage.coco.truth import Truth, read_truth
from storage.errors import ConfigError, ObjectNotFound, TruthMismatch
from storage.stores.open import open_store


def coco(names: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": n, "width": 9, "height": 9} for i, n in enumerate(names)],
        "annotations": [],
        "categories": [{"id": 0, "name": "cell"}],
        **changes,
    }


def truth(*names: str, folder: Path) -> Truth:
    (folder / "truth.json").write_text(json.dumps(coco(list(names))))
    return read_truth(folder / "truth.json")


def join(known: Truth, *image_ids: str) -> Join:
    return join_rows(known, ((image_id, f"shard of {image_id}") for image_id in image_ids))


def joined(known: Truth, *image_ids: str) -> dict[str, str]:
    """Row by name."""
    found = join(known, *image_ids)
    return {known.images[i].name: row for row, i in found.image_of_row.items()}


def test_exact_key(tmp_path: Path) -> None:
    known = truth("a.jpg", "sub/b.jpg", folder=tmp_path)
    assert joined(known, "a.jpg", "sub/b.jpg") == {"a.jpg": "a.jpg", "sub/b.jpg": "sub/b.jpg"}


def test_tar_prefix_by_name_or_by_path(tmp_path: Path) -> None:
    known = truth("0012.jpg", "pages/0013.jpg", folder=tmp_path)
    assert joined(
        known, "shards/demo-3.tar/pages/0012.jpg", "shards/demo-3.tar/pages/0013.jpg"
    ) == {
        "0012.jpg": "shards/demo-3.tar/pages/0012.jpg",
        "pages/0013.jpg": "shards/demo-3.tar/pages/0013.jpg",
    }


def test_a_source_that_is_a_subfolder_of_what_the_truth_describes(tmp_path: Path) -> None:
    known = truth("val/1.jpg", "val/2.jpg", folder=tmp_path)
    assert joined(known, "1.jpg", "2.jpg") == {"val/1.jpg": "1.jpg", "val/2.jpg": "2.jpg"}


def test_exact_wins_over_suffix_whatever_the_order(tmp_path: Path) -> None:
    known = truth("1.jpg", folder=tmp_path)
    for rows in (["1.jpg", "x/1.jpg", "y/1.jpg"], ["y/1.jpg", "x/1.jpg", "1.jpg"]):
        found = join(known, *rows)
        assert found.image_of_row == {"1.jpg": 0}
        assert found.shard_ids == {"shard of 1.jpg"}
        assert found.rows_without_truth == 2


def test_the_longest_ending_counts(tmp_path: Path) -> None:
    known = truth("1.jpg", "b/1.jpg", folder=tmp_path)
    assert joined(known, "t.tar/a/1.jpg", "t.tar/b/1.jpg") == {
        "1.jpg": "t.tar/a/1.jpg",
        "b/1.jpg": "t.tar/b/1.jpg",
    }


def test_part_of_a_file_name_is_not_a_path_suffix(tmp_path: Path) -> None:
    assert join(truth("1.jpg", folder=tmp_path), "a/11.jpg", "x1.jpg").unmatched == ("1.jpg",)


def test_another_folder_of_the_same_name_is_not_a_match(tmp_path: Path) -> None:
    assert join(truth("val/1.jpg", folder=tmp_path), "train/1.jpg").unmatched == ("val/1.jpg",)


def test_windows_and_dot_slash_names(tmp_path: Path) -> None:
    known = truth("./a/1.jpg", "b\\2.jpg", "/c/3.jpg", folder=tmp_path)
    assert set(joined(known, "a/1.jpg", "b/2.jpg", "c/3.jpg").values()) == {
        "a/1.jpg", "b/2.jpg", "c/3.jpg"
    }  # fmt: skip


def test_a_name_that_fits_several_rows_is_an_error_with_counts(tmp_path: Path) -> None:
    known = truth(*(f"{n}.jpg" for n in range(6)), folder=tmp_path)
    rows = [f"{folder}/{n}.jpg" for folder in "abcd" for n in range(5)]
    with pytest.raises(TruthMismatch) as refused:
        join(known, *rows)
    text = str(refused.value)
    assert "6 images, but 5 names fit several rows" in text
    assert "'0.jpg' fits 4 rows: 'a/0.jpg', 'b/0.jpg', 'c/0.jpg', …" in text
    assert text.count(" fits ") == 3
    assert "and 2 more" in text
    assert "file_name" in text


def test_a_row_that_fits_several_names_is_an_error(tmp_path: Path) -> None:
    known = truth("train/1.jpg", "val/1.jpg", "val/2.jpg", folder=tmp_path)
    with pytest.raises(TruthMismatch, match=r"1 rows fit several names") as refused:
        join(known, "1.jpg", "2.jpg")
    assert "row '1.jpg' fits 2 names: 'train/1.jpg', 'val/1.jpg'" in str(refused.value)


def test_unmatched_names_are_an_error_with_three_of_them(tmp_path: Path) -> None:
    known = truth(*(f"{n}.jpg" for n in range(9)), folder=tmp_path)
    found = join(known, "0.jpg", "zzz.jpg")
    with pytest.raises(TruthMismatch) as refused:
        refuse_unmatched(known, found, hint="do this")
    text = str(refused.value)
    assert "8 of 9 images have no row" in text
    assert all(f"'{n}.jpg'" in text for n in (1, 2, 3))
    assert "'4.jpg'" not in text
    assert text.endswith("-> do this")


def test_a_name_listed_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TruthMismatch, match="1 file names twice"):
        join(truth("a.jpg", "./a.jpg", folder=tmp_path), "a.jpg")


paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)


@given(names=st.sets(paths, max_size=6), rows=st.sets(paths, max_size=8))
def test_a_join_is_one_to_one_and_every_pair_a_suffix(
    names: set[str], rows: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    known = truth(*names, folder=tmp_path_factory.mktemp("truth"))
    try:
        found = join(known, *rows)
    except TruthMismatch:
        assert not names <= rows  # a name that is a key always joins
        return
    images = list(found.image_of_row.values())
    assert len(set(images)) == len(images)
    assert len(images) + len(found.unmatched) == len(names)
    assert len(images) + found.rows_without_truth == len(rows)
    for row, i in found.image_of_row.items():
        name = known.images[i].name
        assert f"/{row}".endswith(f"/{name}") or f"/{name}".endswith(f"/{row}")
    for name in names & rows:
        assert known.images[found.image_of_row[name]].name == name


def annotation(**changes: Any) -> dict[str, Any]:
    return {"id": 5, "image_id": 0, "category_id": 0, "bbox": [1, 2, 3, 4], **changes}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "not a COCO"),
        (b'{"images": []}', "categories"),
        (coco(["a"], images=[{"id": 1}]), "file_name"),
        (coco(["a"], images=[{"id": 1, "file_name": "a"}] * 2), "id 1 is used twice"),
        (coco(["a"], annotations=[annotation(image_id=7)]), "(id 5) names image 7"),
        (
            coco(["a"], annotations=[annotation(category_id=7)]),
            "(id 5) has category 7",
        ),
        (
            coco(["a"], annotations=[annotation(bbox=[1, 2, 3])]),
            "bbox is [1, 2, 3], not [x, y",
        ),
        (
            coco(["a"], annotations=[annotation(bbox=[1, 2, -3, 4])]),
            "height is negative",
        ),
        (coco(["a"], annotations=[annotation(bbox=[1, 2, None, 4])]), "not a COCO"),
        (coco(["a"], annotations=[{"image_id": 0}]), "category_id"),
    ],
)
def test_a_damaged_file_is_named_with_the_offence(
    content: bytes | dict[str, Any], says: str, tmp_path: Path
) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "t.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"t\.json") as refused:
        read_truth(tmp_path / "t.json")
    assert says in str(refused.value)


def test_a_missing_file_and_a_folder_say_what_to_give(tmp_path: Path) -> None:
    for gone in (tmp_path / "t.json", tmp_path / "none" / "t.json"):
        with pytest.raises(ObjectNotFound, match=r"none|t\.json") as refused:
            read_truth(gone)
        assert str(refused.value.hint).startswith("ground truth is a COCO .json file")
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(
        ObjectNotFound, match="is a folder, and ground truth is one COCO file"
    ) as no:
        read_truth(tmp_path)
    assert no.value.hint == "name the .json file"
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ObjectNotFound) as named:
        read_truth(str(tmp_path))
    assert named.value.hint == f"name the .json file, such as {tmp_path}/t.json"
    with pytest.raises(ObjectNotFound, match="is a folder"):
        read_truth(f"{tmp_path}/")


def test_a_missing_object_of_a_bucket_is_no_folder() -> None:
    open_store("memory://truths").put("cells/t.json", b"{}")
    with pytest.raises(ObjectNotFound, match=r"absent\.json") as absent:
        read_truth("memory://truths/absent.json")
    assert "is a folder" not in absent.value.message
    assert str(absent.value.hint).startswith("ground truth is a COCO .json file")
    with pytest.raises(ObjectNotFound, match="memory://truths/cells is a folder") as folder:
        read_truth("memory://truths/cells")
    assert folder.value.hint == "name the .json file, such as memory://truths/cells/t.json"


def test_read_from_any_store_and_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.dumps(coco(["a.jpg"], annotations=[annotation(iscrowd=1), annotation(ignore=1)]))
    open_store("memory://truths/deep").put("t.json", raw.encode())
    (tmp_path / "t.json").write_text(raw)
    monkeypatch.chdir(tmp_path)
    for url in ("memory://truths/deep/t.json", "t.json", f"file://{tmp_path}/t.json"):
        found = read_truth(url)
        assert [i.name for i in found.images] == ["a.jpg"]
        assert [b.ignore for b in found.boxes[0]] == [True, True]
        assert found.boxes[0][0].area == 12


def test_categories_by_name_then_loosely() -> None:
    run = ["person", "traffic light", "Car", "dog"]
    names = {1: "car", 0: "person", 10: "Traffic_Light", 7: "cat"}
    assert match_categories(run, names) == {0: 0, 10: 1, 1: 2}


def test_an_exact_name_wins_and_ambiguous_ones_do_not_match() -> None:
    assert match_categories(["car", "Car"], {1: "Car", 2: "CAR"}) == {1: 1, 2: 0}
    assert match_categories(["c a r", "ca r"], {1: "car"}) == {}
    assert match_categories(["car"], {1: "CAR", 2: "C-A-R"}) == {}


NFC, NFD = "bl\u00fctenst\u00e4nde/1.jpg", "blu\u0308tensta\u0308nde/1.jpg"


@pytest.mark.parametrize(("name", "row"), [(NFC, NFD), (NFD, NFC)])
@pytest.mark.parametrize("folder", ["", "shards/a.tar/"])
def test_unicode_forms_of_one_name_join(name: str, row: str, folder: str, tmp_path: Path) -> None:
    assert joined(truth(name, folder=tmp_path), folder + row) == {name: folder + row}


def test_where_both_forms_are_rows_each_name_takes_its_own(tmp_path: Path) -> None:
    assert joined(truth(NFC, NFD, folder=tmp_path), NFD, NFC) == {NFC: NFC, NFD: NFD}
    assert joined(truth(NFC, folder=tmp_path), NFD, NFC) == {NFC: NFC}


def test_a_name_of_two_forms_that_fit_equally_well_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TruthMismatch, match="fits 2 rows"):
        join(truth("\u1e69.jpg", folder=tmp_path), "s\u0323\u0307.jpg", "s\u0307\u0323.jpg")


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("train/a.jpg", "val/a.jpg", "different folders"),
        ("Page1.JPG", "page1.jpg", "upper and lower case"),
        ("a b.jpg", "a%20b.jpg", "percent-encoded"),
        ("a_jpg.rf.0a1b2c3d.jpg", "a.jpg", "Roboflow"),
        ("a.png", "x/a.jpg", "suffix, '.png' and '.jpg'"),
        ("ab.jpg", "a b.jpg", "spaces"),
    ],
)
def test_the_nearest_row_is_shown_with_the_difference(
    name: str, row: str, why: str, tmp_path: Path
) -> None:
    known = truth(name, folder=tmp_path)
    with pytest.raises(TruthMismatch) as refused:
        refuse_unmatched(known, join(known, "zzz/other.bmp", row), hint="")
    assert f"{name!r} is nearest to row {row!r}" in str(refused.value)
    assert why in str(refused.value)


def test_three_nearest_pairs_are_shown_at_most(tmp_path: Path) -> None:
    known = truth(*(f"{n}.png" for n in range(9)), folder=tmp_path)
    found = join(known, *(f"{n}.jpg" for n in range(9)))
    assert len(found.nearest) == 3

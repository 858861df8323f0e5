"""The plumbing of the training arms on a handful of small pictures; no figure means anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.training_arms import ARMS, main, parsed, split, summary
from tests.support.samples.training_samples import image_with_patch

ARMS_HERE = ("teacher", "stored", "reviewed", "round2")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures to learn, six to fit on, two to measure on; one patch on each."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rng, number = np.random.default_rng(0), 0
    for part, count in (("train", 12), ("val", 6), ("test", 2)):
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for _ in range(count):
            number += 1
            x, y = rng.integers(0, 40, 2).tolist()
            name = f"{number}.png"
            pixels = image_with_patch((64, 64), (x, y, x + 20, y + 20), (250, 30, 30))
            Image.fromarray(pixels).save(folder / "images" / name)
            images.append({"id": number, "file_name": name, "width": 64, "height": 64})
            of = {"image_id": number, "iscrowd": 0}
            boxes += [
                {**of, "id": 2 * number, "category_id": 1, "bbox": [x, y, 20, 20], "area": 400},
                {**of, "id": 2 * number + 1, "category_id": 9, "bbox": [0, 0, 4, 4], "area": 16},
            ]
        categories = [{"id": 1, "name": "patch"}, {"id": 9, "name": "DontCare"}]
        coco = {"images": images, "annotations": boxes, "categories": categories}
        (folder / f"{part}.json").write_text(json.dumps(coco))
    return folder


def options(data: Path, out: Path) -> list[str]:
    return [
        *("--data", str(data), "--out", str(out), "--fit-from", "val.json", "--ignore", "DontCare"),
        *("--labelled", "4", "--fit", "5", "--width", "0.25", "--image-size", "64"),
        *("--batch-size", "2", "--teacher-steps", "2", "--steps", "1", "--review-share", "0.5"),
    ]


@pytest.mark.slow
def test_the_arms_run_from_the_teacher_to_a_second_round_and_are_not_repeated(
    data: Path, tmp_path: Path
) -> None:
    given = [*options(data, tmp_path / "out"), "--arms", ",".join(ARMS_HERE)]
    main(given)
    path = tmp_path / "out" / "arms.json"
    found = json.loads(path.read_text())
    assert set(found["arms"]) == {f"{arm}/0" for arm in ARMS_HERE}
    assert all(one["steps"] == 1 for name, one in found["arms"].items() if name != "teacher/0")
    assert found["arms"]["teacher/0"]["images"] == 4
    assert found["arms"]["stored/0"]["images"] == 12  # those labelled, and the pool
    assert found["arms"]["round2/0"]["after"] in ARMS_HERE
    review = found["notes"]["labels of review/0"]
    assert 1 <= review["answered"] <= 4  # half of a pool of eight, where there is reason to ask
    assert review["images_human"] == review["answered"]
    assert review["images_human"] + review["images_model"] == 8
    written = path.read_text()
    main(given)
    assert path.read_text() == written


def test_labelled_pool_and_fit_share_no_image_and_ignored_boxes_are_regions(
    data: Path, tmp_path: Path
) -> None:
    made = split(parsed(options(data, tmp_path / "out")), 3, tmp_path / "split")
    names = {}
    for part in ("labelled", "pool", "fit", "everything"):
        coco = json.loads(getattr(made, part).annotations.read_text())
        names[part] = {image["file_name"] for image in coco["images"]}
    assert [len(names[part]) for part in ("labelled", "pool", "fit")] == [4, 8, 5]
    assert names["labelled"] | names["pool"] == names["everything"]
    assert not names["labelled"] & names["pool"]
    assert not names["fit"] & names["everything"]
    coco = json.loads(made.labelled.annotations.read_text())
    assert [one["name"] for one in coco["categories"]] == ["patch"]
    assert len(coco["annotations"]) == len(coco["ignore"]) == 4


def test_goals_look_at_means_and_at_the_worst_seed() -> None:
    maps = {"teacher": (0.3, 0.4), "labelled": (0.31, 0.41), "hard": (0.29, 0.5),
            "weights": (0.34, 0.44), "reviewed": (0.4, 0.5), "ceiling": (0.5, 0.5)}  # fmt: skip
    arms = {f"{arm}/{seed}": {"map_": v} for arm, vs in maps.items() for seed, v in enumerate(vs)}
    found = summary(arms)
    assert tuple(found["arms"]) == tuple(arm for arm in ARMS if arm in maps)
    best = found["goals"]["best"]
    assert best["arm"] == "hard"
    assert best["gain"] == pytest.approx(0.045)
    assert best["least_gain"] == pytest.approx(-0.01)
    assert not best["met"]  # below its teacher in one seed
    assert found["goals"]["reviewed"]["share"] == pytest.approx(0.1 / 0.15)
    assert found["goals"]["reviewed"]["met"]
    assert found["goals"]["over labelled"] == pytest.approx(0.035)

"""Error types, confusion, calibration against counts by hand; figures against pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipelines.evaluation.diagnosis import d_ece, error_type, la_ece
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.evaluation.result import evaluation_table
from pipelines.policy.policy import Policy
from storage.boxes import clipped, has_area
from storage.coco.truth import read_truth
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import boxes, make_run, row, tar_shard

POLICY = Policy(accept=0.5, reject=0.1)
NAMES = ("RBC", "WBC", "Platelets")


def one_image(folder: Path, true: list[tuple[list[int], int]], found: Any) -> tuple[Manifest, Path]:
    coco = {
        "images": [{"id": 0, "file_name": "0.jpg", "width": 640, "height": 480}],
        "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)],
        "annotations": [
            {"id": i, "image_id": 0, "category_id": k, "bbox": xywh}
            for i, (xywh, k) in enumerate(true)
        ],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(coco))
    shard = tar_shard("a.tar")
    rows = {shard: [row("a.tar/0.jpg", detections=found)]}
    return make_run(MemoryStore(), rows, classes=NAMES), path


def test_every_kind_of_error_once(tmp_path: Path) -> None:
    true = [([0, 0, 100, 100], 0), ([200, 0, 100, 100], 0), ([400, 0, 100, 100], 0),
            ([0, 200, 100, 100], 1), ([200, 200, 100, 100], 1)]  # fmt: skip
    found = boxes(
        [
            (0, 0, 100, 100),  # right
            (0, 5, 100, 105),  # duplicate
            (200, 0, 300, 100),  # of another class
            (430, 30, 530, 130),  # misplaced: IoU 0.32
            (30, 230, 130, 330),  # misplaced and of another class
            (500, 400, 560, 460),  # nothing there
        ],
        [0.95, 0.9, 0.85, 0.8, 0.75, 0.7],
        [0, 0, 2, 0, 2, 0],
    )
    policy = Policy(accept=0.5, reject=0.1, one_object=None)
    manifest, path = one_image(tmp_path, true, found)
    d = evaluate_run(manifest, path, policy=policy).diagnosis
    assert d is not None
    assert d.errors == {
        "class": 1, "location": 1, "class_and_location": 1, "duplicate": 1, "background": 1,
        "missed": 2,
    }  # fmt: skip
    assert (d.precision, d.recall) == (1 / 6, 1 / 5)
    assert d.confusion == ((1, 0, 1, 1), (0, 0, 0, 2), (0, 0, 0, 0), (3, 0, 1, 0))
    assert {m.share for m in d.worst} == {100 * 100 / (640 * 480)}
    assert len(d.worst) == 4


def test_a_box_below_the_threshold_is_not_a_label(tmp_path: Path) -> None:
    found = boxes([(0, 0, 100, 100)], [0.4], [0])
    d = evaluate_run(*one_image(tmp_path, [([0, 0, 100, 100], 0)], found), policy=POLICY).diagnosis
    assert d is not None
    assert (d.precision, d.recall, d.errors["missed"]) == (None, 0.0, 1)


def test_the_table_has_the_diagnosis(tmp_path: Path) -> None:
    from rich.console import Console

    found = boxes([(0, 0, 100, 100)], [0.9], [0])
    e = evaluate_run(*one_image(tmp_path, [([0, 0, 100, 100], 0)], found), policy=POLICY)
    out = Console(file=io.StringIO(), width=160)
    out.print(evaluation_table(e))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "calibration error" in text
    assert "nothing there" in text
    assert json.loads(json.dumps(e.to_fields()))["diagnosis"]["recall"] == 1.0


def test_error_types_without_any_object() -> None:
    assert error_type(np.zeros(0), np.zeros(0, np.bool_)) == ("background", -1)


def test_calibration_errors_by_hand() -> None:
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.1, 0.1])
    hit = np.array([1, 1, 1, 0, 0, 0])
    assert d_ece(confidence, hit) == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)
    overlap = np.array([0.8, 0.6, 1.0, 0.0, 0.0, 0.0])
    ids = np.array([0, 0, 0, 0, 1, 1])
    assert la_ece(confidence, hit, overlap, ids) == pytest.approx((0.3 + 0.1) / 2)
    assert d_ece(np.zeros(0), np.zeros(0)) is None


SETS = {
    "bccd": ("bccd/test.json", ()),
    "hituav": ("hituav/val.json", ("DontCare",)),
    "coco_ccby": ("coco_ccby/instances.json", ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_figures_equal_pycocotools_on_real_truth(name: str, data_dir: Path, tmp_path: Path) -> None:
    file, without = SETS[name]
    coco = json.loads((data_dir / file).read_text())
    dropped = {c["id"] for c in coco["categories"] if c["name"] in without}
    coco["categories"] = [c for c in coco["categories"] if c["id"] not in dropped]
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] not in dropped]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(coco))
    manifest = _noisy_run(path)
    e = evaluate_run(manifest, path)
    expected = _pycocotools(path, manifest)
    ours = [e.map_, e.map50, e.map75, e.ap_small, e.ap_medium, e.ap_large,
            e.ar, e.ar_small, e.ar_medium, e.ar_large]  # fmt: skip
    theirs = expected[[0, 1, 2, 3, 4, 5, 8, 9, 10, 11]]
    assert 0.05 < theirs[0] < 0.95
    np.testing.assert_allclose([-1 if v is None else v for v in ours], theirs, atol=1e-6)


def _noisy_run(path: Path) -> Manifest:
    """Detections near the truth of every image, with false ones, some beyond the border."""
    truth, rng = read_truth(path), np.random.default_rng(7)
    ids = {official: k for k, official in enumerate(truth.categories)}
    rows = []
    for image, true in zip(truth.images, truth.boxes, strict=True):
        near = [b for b in true if rng.random() < 0.8]
        at = np.array([b.xyxy for b in near], np.float64).reshape(-1, 4)
        side = np.maximum(at[:, 2:] - at[:, :2], 2)
        at = at + rng.normal(0, 0.08, at.shape) * np.tile(side, 2)
        at[:, 2:] = np.maximum(at[:, 2:], at[:, :2] + 1)
        wrong = rng.random((3, 4)) * ([image.width, image.height] * 2)
        at = np.concatenate([at, np.column_stack([wrong[:, :2], wrong[:, :2] + 40])])
        classes = [ids[b.category_id] for b in near] + rng.integers(0, len(ids), 3).tolist()
        scores = np.sort(rng.random(len(at)))[::-1]
        found = boxes(at.tolist(), scores.tolist(), classes)
        rows.append(row(f"a.tar/{image.name}", detections=found, size=(image.width, image.height)))
    shard = tar_shard("a.tar")
    return make_run(MemoryStore(), {shard: rows}, classes=tuple(truth.categories.values()))


def _pycocotools(path: Path, manifest: Manifest) -> np.ndarray[Any, Any]:
    coco = json.loads(path.read_text())
    number = {i["file_name"]: i["id"] for i in coco["images"]}
    official = [c["id"] for c in coco["categories"]]
    found = []
    for one in live_rows(manifest):
        d = one.detections
        at = clipped(d.boxes.astype(np.float64), one.width, one.height)
        for keep, (x1, y1, x2, y2), score, k in zip(
            has_area(at), at.tolist(), d.scores, d.category_ids, strict=True
        ):
            if keep:
                found.append(
                    {
                        "image_id": number[one.image_id.removeprefix("a.tar/")],
                        "category_id": official[k],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": float(score),
                    }
                )
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(path))
        known.dataset.setdefault("info", {})
        run = COCOeval(known, known.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.asarray(run.stats)

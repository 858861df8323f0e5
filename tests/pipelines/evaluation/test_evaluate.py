"""Evaluation: COCO's own figures, over what run and ground truth share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from rich.console import Console

import pipelines.evaluation.evaluate
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.evaluation.result import Evaluation, evaluation_table, remarks
from storage.errors import TruthMismatch
from storage.records import AnnotationRow, Detections
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import (
    boxes,
    image_shard,
    list_shards,
    make_run,
    random_boxes,
    row,
    tar_shard,
)

NAMES = ("RBC", "WBC", "Platelets")


def write_truth(
    folder: Path, images: list[str], annotations: list[dict[str, Any]], **changes: Any
) -> Path:
    coco = {
        "images": [
            {"id": i, "file_name": n, "width": 640, "height": 480} for i, n in enumerate(images)
        ],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations)],
        "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)],
        **changes,
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(coco))
    return path


def run_of(rows: list[AnnotationRow], classes: tuple[str, ...] = NAMES) -> Manifest:
    shard = tar_shard("a.tar")
    return make_run(MemoryStore(), {shard: rows}, classes=classes)


def near(d: Detections, rng: np.random.Generator) -> list[list[float]]:
    """Boxes of ground truth (xywh) near some of the detections."""
    keep = rng.random(len(d)) < 0.7
    moved = d.boxes[keep] + rng.normal(0, 6, (int(keep.sum()), 4))
    return [[x1, y1, max(x2 - x1, 1), max(y2 - y1, 1)] for x1, y1, x2, y2 in moved.tolist()]


@pytest.fixture
def example(tmp_path: Path) -> tuple[Manifest, Path]:
    """60 images with boxes of which most are near one in the ground truth."""
    rng = np.random.default_rng(1)
    rows, annotations = [], []
    for i in range(60):
        found = random_boxes(rng, int(rng.integers(0, 12)), 640, 480)
        rows.append(row(f"a.tar/{i}.jpg", detections=found))
        for n, xywh in enumerate(near(found, rng)):
            crowd = int(rng.random() < 0.1)
            annotations.append(
                {
                    "image_id": i,
                    "category_id": int(found.category_ids[n % len(found)]),
                    "bbox": xywh,
                    "area": xywh[2] * xywh[3],
                    "iscrowd": crowd,
                }
            )
    return run_of(rows), write_truth(tmp_path, [f"{i}.jpg" for i in range(60)], annotations)


def coco_figures(manifest: Manifest, truth: Path) -> list[float]:
    """The same through faster-coco-eval in one go, written as its documentation does."""
    from storage.runs.live_rows import live_rows

    known = json.loads(truth.read_text())
    for a in known["annotations"]:
        a["id"] += 1
    gt = COCO(known)
    found = []
    for one in live_rows(manifest):
        number = int(one.image_id.split("/")[-1].removesuffix(".jpg"))
        d = one.detections
        for box, score, category in zip(d.boxes, d.scores, d.category_ids, strict=True):
            x1, y1, x2, y2 = (float(v) for v in box)
            bbox = [x1, y1, x2 - x1, y2 - y1]
            found.append(
                {
                    "image_id": number,
                    "category_id": int(category),
                    "bbox": bbox,
                    "score": float(score),
                }
            )
    run = COCOeval_faster(gt, gt.loadRes(found), "bbox", print_function=lambda *_: None)
    run.run()
    return [float(v) for v in run.all_stats[:9]]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 60, 512])
def test_figures_are_cocos_whatever_the_chunk(
    chunk: int, example: tuple[Manifest, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.evaluation.evaluate, "CHUNK_IMAGES", chunk)
    e = evaluate_run(*example)
    expected = coco_figures(*example)
    ours = [e.map_, e.map50, e.map75, e.ap_small, e.ap_medium, e.ap_large]
    np.testing.assert_allclose(ours, expected[:6], atol=1e-9)
    assert e.ar == pytest.approx(expected[8])
    assert 0.05 < e.map_ < 0.9
    assert e.map_ == pytest.approx(np.mean([c.ap for c in e.classes]))


def perfect(tmp_path: Path) -> tuple[Path, list[AnnotationRow]]:
    at = [(10.0, 10.0, 110.0, 60.0), (200.0, 200.0, 260.0, 300.0)]
    annotations = [
        {"image_id": i, "category_id": c, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i in range(2)
        for c, (x1, y1, x2, y2) in enumerate(at)
    ]
    rows = [row(f"a.tar/{i}.jpg", detections=boxes(at, [0.9, 0.8], [0, 1])) for i in range(2)]
    return write_truth(tmp_path, ["0.jpg", "1.jpg"], annotations), rows


def test_perfect_detections_and_category_ids_from_zero(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    e = evaluate_run(run_of(rows), truth)
    assert (e.map_, e.map50, e.map75, e.ar) == (1.0, 1.0, 1.0, 1.0)
    assert [(c.name, c.official_id, c.ap, c.truth, c.detections) for c in e.classes] == [
        ("RBC", 0, 1.0, 2, 2),
        ("WBC", 1, 1.0, 2, 2),
        ("Platelets", 2, None, 0, 0),
    ]
    assert remarks(e) == []


def test_an_image_that_could_not_be_read_counts_as_empty(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    e = evaluate_run(run_of([rows[0], row("a.tar/1.jpg", status="undecodable")]), truth)
    assert e.statuses == {"ok": 1, "undecodable": 1}
    assert e.ar == 0.5
    assert any("1 undecodable" in line for line in remarks(e))


def test_images_without_a_row_are_refused_or_left_out(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    with pytest.raises(TruthMismatch, match=r"1 of 2 images have no row\n  '1\.jpg'") as refused:
        evaluate_run(run_of(rows[:1]), truth)
    assert "--allow-missing" in str(refused.value)
    e = evaluate_run(run_of(rows[:1]), truth, allow_missing=True)
    assert (e.images, e.missing, e.map_) == (1, 1, 1.0)


def test_nothing_that_joins_is_an_error_even_where_missing_is_allowed(tmp_path: Path) -> None:
    truth, _ = perfect(tmp_path)
    with pytest.raises(TruthMismatch, match="2 of 2 images have no row"):
        evaluate_run(run_of([row("a.tar/x.jpg")]), truth, allow_missing=True)


def test_rows_without_truth_are_left_out_and_counted(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    false = row("a.tar/more.jpg", detections=boxes([(0, 0, 9, 9)], [1.0], [0]))
    e = evaluate_run(run_of([*rows, false]), truth)
    assert (e.images, e.rows_without_truth, e.map_) == (2, 1, 1.0)


def test_dontcare_regions_and_crowds_count_neither_way(tmp_path: Path) -> None:
    _, rows = perfect(tmp_path)
    annotations = [{"image_id": 0, "category_id": 3, "bbox": [0, 0, 150, 100]}] + [
        {"image_id": 1, "category_id": 0, "bbox": [0, 0, 300, 300], "ignore": 1},
        {"image_id": 1, "category_id": 1, "bbox": [200, 200, 60, 100]},
        {"image_id": 0, "category_id": 1, "bbox": [200, 200, 60, 100]},
    ]
    categories = [{"id": i, "name": n} for i, n in enumerate([*NAMES, "DontCare"])]
    truth = write_truth(tmp_path, ["0.jpg", "1.jpg"], annotations, categories=categories)
    e = evaluate_run(run_of(rows), truth)
    assert e.ignored == 2
    assert e.unknown_to_run == ()
    assert e.classes[0].truth == 0
    assert e.classes[0].ap is None  # both of its detections lie in regions to ignore
    assert e.map_ == 1.0


def test_a_class_can_be_named_as_ignore(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    e = evaluate_run(run_of(rows), truth, ignore_classes=["wbc"])
    assert [c.name for c in e.classes] == ["RBC", "Platelets"]
    assert e.unknown_to_truth == ("WBC",)
    assert (e.ignored, e.map_) == (2, 1.0)


def test_classes_are_matched_by_name_and_the_rest_is_told(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    e = evaluate_run(run_of(rows, classes=("rbc", "monocyte", "w b c")), truth)
    assert [c.name for c in e.classes] == ["RBC", "WBC"]
    assert e.unknown_to_run == ("Platelets",)
    assert e.unknown_to_truth == ("monocyte",)
    assert e.classes[0].ap == 1.0
    assert e.classes[1].ap == 0.0  # the run's id 1 is another class than the file's


def test_no_class_in_common_is_an_error(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    with pytest.raises(TruthMismatch, match="share no class"):
        evaluate_run(run_of(rows, classes=("cat", "dog", "cow")), truth)


def test_sizes_that_differ_are_told(tmp_path: Path) -> None:
    truth, _ = perfect(tmp_path)
    e = evaluate_run(run_of([row(f"a.tar/{i}.jpg", size=(480, 640)) for i in range(2)]), truth)
    assert e.n_size_differs == 2
    assert e.size_differs == ("a.tar/0.jpg", "a.tar/1.jpg")
    assert any("EXIF" in line for line in remarks(e))


def test_a_run_without_any_detection_is_zero_not_an_error(tmp_path: Path) -> None:
    truth, _ = perfect(tmp_path)
    e = evaluate_run(run_of([row(f"a.tar/{i}.jpg") for i in range(2)]), truth)
    assert (e.map_, e.ar) == (0.0, 0.0)


def test_a_truth_without_any_box_has_no_figures(tmp_path: Path) -> None:
    truth = write_truth(tmp_path, ["0.jpg"], [])
    e = evaluate_run(run_of([row("a.tar/0.jpg")]), truth)
    assert (e.map_, e.ar) == (None, None)


def test_tombstoned_rows_do_not_join(tmp_path: Path) -> None:
    truth, _ = perfect(tmp_path)
    old = image_shard("0.jpg", "1.jpg")
    manifest = make_run(MemoryStore(), {old: [row("0.jpg"), row("1.jpg")]})
    list_shards(manifest.store, [image_shard("0.jpg")])
    with pytest.raises(TruthMismatch, match="1 of 2"):
        evaluate_run(manifest, truth)


def shown(e: Evaluation) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(evaluation_table(e))
    return console.export_text()


def test_json_and_table(example: tuple[Manifest, Path]) -> None:
    e = evaluate_run(*example)
    plain = json.loads(json.dumps(e.to_fields()))
    assert plain["mAP"] == e.map_
    assert {"mAP50", "mAP75", "AR", "AP_small", "images", "missing"} <= plain.keys()
    assert plain["classes"][1]["AP50"] == e.classes[1].ap50
    assert not any(k.startswith(("map", "ap_")) for k in plain)
    text = shown(e)
    assert f"{100 * e.map_:.1f}" in text
    assert "Platelets" in text


def test_class_names_are_text_in_the_table(tmp_path: Path) -> None:
    truth, rows = perfect(tmp_path)
    known = json.loads(truth.read_text())
    known["categories"][0]["name"] = "[bold]x[/nope]"
    truth.write_text(json.dumps(known))
    names = ("[bold]x[/nope]", "WBC", "[/red]")
    assert "[bold]x[/nope]" in shown(evaluate_run(run_of(rows, classes=names), truth))


def test_detections_are_clipped_to_their_image_and_those_outside_are_counted(
    tmp_path: Path,
) -> None:
    annotations = [{"image_id": 0, "category_id": 0, "bbox": [600, 400, 40, 80]}]
    truth = write_truth(tmp_path, ["0.jpg"], annotations)
    beyond = boxes([(600, 400, 720, 560), (650, 10, 700, 50)], [0.9, 0.95], [0, 0])
    e = evaluate_run(run_of([row("a.tar/0.jpg", detections=beyond)]), truth)
    assert e.map_ == 1.0  # unclipped: IoU 0.17, and a false positive before it
    assert e.outside == 1
    assert any("lie outside their image: 1" in line for line in remarks(e))


def test_two_categories_of_one_name_cost_nothing(tmp_path: Path) -> None:
    _, rows = perfect(tmp_path)
    at = [(10, 10, 100, 50), (200, 200, 60, 100)]
    annotations = [
        {"image_id": i, "category_id": c, "bbox": list(xywh)}
        for i in range(2)
        for c, xywh in zip((1, 2), at, strict=True)
    ]
    categories = [{"id": 0, "name": "RBC", "supercategory": "none"}] + [
        {"id": k, "name": n, "supercategory": "RBC"} for k, n in enumerate(NAMES, 1)
    ]
    truth = write_truth(tmp_path, ["0.jpg", "1.jpg"], annotations, categories=categories)
    e = evaluate_run(run_of(rows), truth)
    assert e.map_ == 1.0
    assert (e.unknown_to_run, e.unknown_to_truth) == ((), ())

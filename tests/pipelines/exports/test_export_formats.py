"""Each format as its own tools read it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.exports.export import ExportFormat, ExportRequest, export_version
from storage.coco.truth import read_truth
from storage.errors import ConfigError
from tests.pipelines.exports.labelled import (
    FOUND,
    Labelled,
    export_to,
)


def test_coco_has_official_ids_and_the_ignore_list_twice(loose: Labelled, tmp_path: Path) -> None:
    export_to(loose, tmp_path / "out", "coco")
    loaded = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [c["id"] for c in loaded["categories"]] == [1, 2, 3]
    crowds = [a for a in loaded["annotations"] if a["iscrowd"]]
    assert [a["bbox"] for a in loaded["ignore"]] == [a["bbox"] for a in crowds]
    assert {a["id"] for a in loaded["annotations"]} == set(range(1, 8))
    assert loaded["info"]["version"] == "v0001"


def test_our_own_evaluation_reads_the_coco_export(loose: Labelled, tmp_path: Path) -> None:
    export_to(loose, tmp_path / "out", "coco")
    truth = read_truth(tmp_path / "out" / "annotations.json")
    assert len(truth.images) == 4


def test_coco_tools_load_and_evaluate_the_export(loose: Labelled, tmp_path: Path) -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    export_to(loose, tmp_path / "out", "coco")
    truth = COCO(str(tmp_path / "out" / "annotations.json"))
    assert len(truth.imgs) == 4
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9,
        }
        for a in truth.anns.values()
    ]
    evaluated = COCOeval_faster(truth, truth.loadRes(results), "bbox", print_function=lambda *_: 0)
    evaluated.run()
    assert evaluated.stats[0] == pytest.approx(1.0)


def test_yolo_says_its_classes_and_keeps_the_empty_image(loose: Labelled, tmp_path: Path) -> None:
    export_to(loose, tmp_path / "out", "yolo", "copy")
    described = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert "path" not in described  # a loader then takes the folder that data.yaml lies in
    assert described["names"] == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert (tmp_path / "out" / "labels" / "b.txt").read_text() == ""
    images = {p.stem for p in (tmp_path / "out" / "images").iterdir()}
    labels = {p.stem for p in (tmp_path / "out" / "labels").iterdir()}
    assert images == labels
    assert len(images) == 4


def test_hugging_face_features_name_the_classes(loose: Labelled, tmp_path: Path) -> None:
    export_to(loose, tmp_path / "out", "hf", "copy")
    (part,) = (tmp_path / "out" / "data").iterdir()
    metadata = pq.read_schema(part).metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert features["objects"]["category"]["feature"]["names"] == ["RBC", "WBC", "Platelets"]
    assert features["image"] == {"_type": "Image"}


@pytest.mark.slow
def test_super_gradients_own_classes_load_the_exports(loose: Labelled, tmp_path: Path) -> None:
    from workers.yolo_nas.network import import_super_gradients

    import_super_gradients()
    from super_gradients.training.datasets.detection_datasets.coco_format_detection import (
        COCOFormatDetectionDataset,
    )
    from super_gradients.training.datasets.detection_datasets.yolo_format_detection import (
        YoloDarknetFormatDetectionDataset,
    )

    names = ["RBC", "WBC", "Platelets"]
    export_to(loose, tmp_path / "coco", "coco", "copy")
    export_to(loose, tmp_path / "yolo", "yolo", "copy")
    coco = COCOFormatDetectionDataset(
        data_dir=str(tmp_path / "coco"),
        json_annotation_file="annotations.json",
        images_dir="images",
        with_crowd=True,
        all_classes_list=names,
        ignore_empty_annotations=False,
        input_dim=None,
        transforms=[],
    )
    yolo = YoloDarknetFormatDetectionDataset(
        data_dir=str(tmp_path / "yolo"),
        images_dir="images",
        labels_dir="labels",
        classes=names,
        ignore_empty_annotations=False,
        input_dim=None,
        transforms=[],
    )
    assert len(coco) == len(yolo) == 4
    targets = [coco.get_sample(i) for i in range(4)]
    assert sorted(len(t["target"]) for t in targets) == [0, 1, 2, 2]
    assert sorted(len(t["crowd_target"]) for t in targets) == [0, 0, 1, 1]
    assert all(t["image"].shape == (48, 64, 3) for t in targets)
    from_yolo = [yolo.get_sample(i)["target"] for i in range(4)]
    assert sorted(len(t) for t in from_yolo) == [0, 1, 2, 2]
    largest = max((t for t in from_yolo if len(t) == 2), key=len)
    assert np.abs(largest[:, :4] - FOUND.boxes[:2]).max() < 0.05
    assert largest[:, 4].tolist() == [0, 2]


def test_ignore_boxes_can_be_left_in_or_out(loose: Labelled, tmp_path: Path) -> None:
    def export(format: ExportFormat, keep: str) -> Path:
        dest = tmp_path / f"{format}-{keep}"
        export_version(loose.manifest, str(dest), ExportRequest(format, ignore_boxes=keep))  # type: ignore[arg-type]
        return dest

    crowds = {
        keep: [
            a["iscrowd"]
            for a in json.loads((export("coco", keep) / "annotations.json").read_text())[
                "annotations"
            ]
        ]
        for keep in ("in", "out")
    }
    assert (sum(crowds["in"]), sum(crowds["out"])) == (2, 0)
    assert len(crowds["in"]) - len(crowds["out"]) == 2
    lines = {
        keep: sum(
            len(p.read_text().splitlines()) for p in (export("yolo", keep) / "labels").iterdir()
        )
        for keep in ("in", "out")
    }
    assert lines == {"in": 7, "out": 5}
    rows = pq.read_table(export("hf", "in") / "data").to_pylist()
    assert sum(sum(row["objects"]["ignore"]) for row in rows) == 2
    assert sum(len(row["ignored"]["bbox"]) for row in rows) == 2
    with pytest.raises(ConfigError, match="ignore boxes 'maybe'"):
        export("coco", "maybe")


def test_coco_says_who_labelled_and_when(loose: Labelled, tmp_path: Path) -> None:
    export_to(loose, tmp_path / "out", "coco")
    images = json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]
    said = {i["labelfleet"]["source"]: i["labelfleet"] for i in images}
    assert said["human"]["annotator"] == "ann"
    assert said["human"]["labelled_at"] == "2026-01-01T00:00:00+00:00"
    assert said["model"]["annotator"] is None
    (row,) = [r for r in pq.read_table(_hf(loose, tmp_path)).to_pylist() if r["source"] == "human"]
    assert (row["annotator"], row["labelled_at"]) == ("ann", datetime(2026, 1, 1, tzinfo=UTC))


def _hf(labelled: Labelled, tmp_path: Path) -> Path:
    export_to(labelled, tmp_path / "hf", "hf")
    return tmp_path / "hf" / "data"


@pytest.mark.slow
def test_pycocotools_and_supervision_read_every_box(loose: Labelled, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import supervision as sv
    from pycocotools.coco import COCO

    dest = tmp_path / "out"
    export_to(loose, dest, "coco", "copy")
    known = COCO(str(dest / "annotations.json"))
    for annotation in known.anns.values():
        *_, w, h = annotation["bbox"]
        assert known.annToMask(annotation).sum() == pytest.approx(w * h, rel=0.2)
    for image in known.imgs:
        known.showAnns(known.loadAnns(known.getAnnIds(image)))
    data = sv.DetectionDataset.from_coco(str(dest / "images"), str(dest / "annotations.json"))
    assert data.classes == ["RBC", "WBC", "Platelets"]
    assert sum(len(found) for _, _, found in data) == 7
    yolo = tmp_path / "yolo"
    export_to(loose, yolo, "yolo", "copy")
    data = sv.DetectionDataset.from_yolo(
        str(yolo / "images"), str(yolo / "labels"), str(yolo / "data.yaml")
    )
    assert sum(len(found) for _, _, found in data) == 5


def test_the_splits_of_the_documentation_work(
    loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
    for_coco, for_yolo = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for kind, code in (("coco", for_coco), ("yolo", for_yolo)):
        dest = tmp_path / kind
        export_to(loose, dest, kind)  # type: ignore[arg-type]
        monkeypatch.chdir(dest)
        exec(code.replace("0.1", "0.5"), {})
    parts = [json.loads((tmp_path / "coco" / f"{p}.json").read_text()) for p in ("train", "val")]
    assert sum(len(part["images"]) for part in parts) == 4
    assert sum(len(part["annotations"]) for part in parts) == 7
    lists = [(tmp_path / "yolo" / f"{p}.txt").read_text().split() for p in ("train", "val")]
    assert len(lists[0]) + len(lists[1]) == 4
    assert not set(lists[0]) & set(lists[1])
    assert [len(part["images"]) for part in parts] == [len(one) for one in lists]

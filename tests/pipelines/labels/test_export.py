"""Exports: what a version holds comes back from every format, inside its folder and loadable."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.labels.decide import decide_run
from pipelines.labels.export import ExportFormat, ExportSummary, export_version
from pipelines.policy.policy import Policy
from storage.coco.truth import read_truth
from storage.errors import ConfigError
from storage.labels.rows import LabelRow, label_rows
from storage.labels.versions import read_label_tables, read_version
from storage.records import AnnotationRow, Shard
from storage.review.answers import Answer, ReviewedBox, append_answers
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.shards.reading import read_shard
from storage.shards.selecting import group_images, tar_shards
from storage.stores.open import open_store
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import boxes, commit_rows, make_run

POLICY = Policy(accept=0.7, reject=0.1)
FORMATS: tuple[ExportFormat, ...] = ("coco", "yolo", "hf")
FOUND = boxes(
    [[10.5, 20.25, 30, 40], [0, 0, 64, 48], [5, 5, 9, 9], [1, 1, 3, 3]],
    [0.9, 0.8, 0.3, 0.05], [0, 2, 1, 1],
)  # fmt: skip


def jpeg(shade: int) -> bytes:
    ok, raw = cv2.imencode(".jpg", np.full((48, 64, 3), shade, np.uint8))
    assert ok
    return bytes(raw)


@dataclass(frozen=True)
class Labelled:
    """A run over real files, with one label version: a model's, a person's, an empty image."""

    manifest: Manifest
    raw: dict[str, bytes]

    def rows(self) -> list[LabelRow]:
        lineage = read_version(self.manifest.store)
        return [r for t in read_label_tables(self.manifest.store, lineage) for r in label_rows(t)]


def _labelled(tmp_path: Path, shard: Shard) -> Labelled:
    source = open_store(str(tmp_path / "source"))
    rows, raw = [], {}
    for n, record in enumerate(read_shard(source, shard, max_image_bytes=10**9)):
        assert record.data is not None
        raw[record.image_id] = record.data
        found = FOUND if n != 1 else None
        row = distinct_row(record.image_id, shard, found, width=64, height=48)
        digest = hashlib.sha256(record.data).hexdigest()
        rows.append(replace(row, sha256=digest, offset=record.offset, nbytes=record.nbytes))
    manifest = make_run(open_store(str(tmp_path / "run")), {}, source=str(tmp_path / "source"))
    Listing(manifest.store).refresh(shard.objects, lambda objects: _only(shard, objects))
    commit_rows(manifest, shard, rows)
    append_answers(manifest.store, [_answer(rows[-1])])
    decide_run(manifest, POLICY)
    return Labelled(manifest, raw)


def _only(shard: Shard, objects: object) -> object:
    assert list(objects)  # type: ignore[call-overload]
    return iter([shard])


def _answer(row: AnnotationRow) -> Answer:
    made = ReviewedBox((8, 8, 20, 24), "WBC", "added")
    return Answer(
        row.image_id, row.sha256, 1, 1, "ann", 9.0, datetime(2026, 1, 1, tzinfo=UTC), False,
        (made,), (), "m", False,
    )  # fmt: skip


@pytest.fixture
def loose(tmp_path: Path) -> Labelled:
    """Loose images, one in a folder."""
    (tmp_path / "run").mkdir()
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for n, name in enumerate(("a.jpg", "b.jpg", "sub/a.jpg", "z.png")):
        (folder / name).write_bytes(jpeg(40 * n))
    listed = list(open_store(str(folder)).list())
    (shard,) = group_images(listed, 100)
    return _labelled(tmp_path, shard)


@pytest.fixture(params=["shards.tar", "shards.tar.gz"])
def hostile(tmp_path: Path, request: pytest.FixtureRequest) -> Labelled:
    """A tar whose members want to be anywhere but in the export's folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / request.param
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for n, name in enumerate(
            ("../../escape.jpg", "/abs.jpg", "a.jpg", "A.JPG", "a.jpg", "c:\\x.jpg", "n\nl.jpg")
        ):
            member = tarfile.TarInfo(name)
            raw = jpeg(30 * n)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    (shard,) = tar_shards(open_store(str(tmp_path / "source")).list())
    return _labelled(tmp_path, shard)


def _export(
    labelled: Labelled, dest: Path, format: ExportFormat, images: str = "none"
) -> ExportSummary:
    return export_version(labelled.manifest, str(dest), format, images=images)  # type: ignore[arg-type]


Exported = list[tuple[tuple[float, ...], int, bool]]


def _expected(labelled: Labelled) -> dict[str, Exported]:
    return {
        row.image_id: [(x.bbox, x.category_id, x.ignore) for x in row.labels]
        for row in labelled.rows()
    }


def _from_coco(dest: Path) -> dict[str, Exported]:
    loaded = json.loads((dest / "annotations.json").read_text())
    by_official = {c["id"]: i for i, c in enumerate(loaded["categories"])}
    ids = {i["id"]: i["labelfleet"]["image_id"] for i in loaded["images"]}
    found: dict[str, Exported] = {image_id: [] for image_id in ids.values()}
    for a in loaded["annotations"]:
        x, y, w, h = a["bbox"]
        box = ((x, y, x + w, y + h), by_official[a["category_id"]], bool(a["iscrowd"]))
        found[ids[a["image_id"]]].append(box)
    return found


def _from_yolo(dest: Path) -> dict[str, Exported]:
    found: dict[str, Exported] = {}
    for line in (dest / "names.jsonl").read_text().splitlines():
        entry = json.loads(line)
        stem = entry["file"].rsplit(".", 1)[0]
        found[entry["image_id"]] = [
            *_yolo_boxes(dest / "labels" / f"{stem}.txt", False),
            *_yolo_boxes(dest / "ignore" / f"{stem}.txt", True),
        ]
    return found


def _yolo_boxes(path: Path, ignore: bool) -> Exported:
    made = []
    for line in path.read_text().splitlines() if path.exists() else ():
        label, cx, cy, w, h = line.split()
        x, y, bw, bh = float(cx) * 64, float(cy) * 48, float(w) * 64, float(h) * 48
        made.append(((x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2), int(label), ignore))
    return made


def _from_hf(dest: Path) -> dict[str, Exported]:
    found: dict[str, Exported] = {}
    for row in pq.read_table(dest / "data").to_pylist():
        o = row["objects"]
        found[row["image_id"]] = [
            ((x, y, x + w, y + h), label, ignore)
            for (x, y, w, h), label, ignore in zip(
                o["bbox"], o["category"], o["ignore"], strict=True
            )
        ]
    return found


READERS = {"coco": _from_coco, "yolo": _from_yolo, "hf": _from_hf}


@pytest.mark.parametrize("format", FORMATS)
def test_every_image_and_box_comes_back(
    loose: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    summary = _export(loose, tmp_path / "out", format)
    found, expected = READERS[format](tmp_path / "out"), _expected(loose)
    assert found.keys() == expected.keys()
    for image_id, wanted in expected.items():
        assert len(found[image_id]) == len(wanted)
        for (box, label, ignore), (got, got_label, got_ignore) in zip(
            sorted(wanted, key=str), sorted(found[image_id], key=str), strict=True
        ):
            np.testing.assert_allclose(got, box, atol=2e-3)
            assert (got_label, got_ignore) == (label, ignore)
    assert (summary.images, summary.empty, summary.left_out) == (4, 1, 0)
    assert (summary.labels, summary.ignored) == (5, 2)


@pytest.mark.parametrize("format", FORMATS)
def test_copied_images_are_the_same_bytes_and_nothing_leaves_the_folder(
    hostile: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    dest = tmp_path / "place" / "out"
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    summary = _export(hostile, dest, format, "copy")
    assert (summary.images, summary.left_out) == (7, 0)
    made = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert all(p.is_relative_to(dest) for p in made)
    assert READERS[format](dest).keys() == hostile.raw.keys()
    if format == "hf":
        table = pq.read_table(dest / "data").to_pylist()
        copied = {row["image_id"]: row["image"]["bytes"] for row in table}
        assert copied == hostile.raw
    else:
        copied_bytes = sorted(p.read_bytes() for p in (dest / "images").rglob("*") if p.is_file())
        assert copied_bytes == sorted(hostile.raw.values())


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_links_lead_to_the_source(loose: Labelled, tmp_path: Path, format: ExportFormat) -> None:
    dest = tmp_path / "out"
    _export(loose, dest, format, "link")
    links = [p for p in (dest / "images").rglob("*") if p.is_symlink()]
    assert sorted(p.read_bytes() for p in links) == sorted(loose.raw.values())


def test_links_stay_in_a_folder_with_an_odd_name(loose: Labelled, tmp_path: Path) -> None:
    dest = tmp_path / "a b" / "50% ü"
    _export(loose, dest, "coco", "link")
    links = [p for p in tmp_path.rglob("*") if p.is_symlink()]
    assert len(links) == 4
    assert all(p.is_relative_to(dest / "images") for p in links)
    assert sorted(p.read_bytes() for p in links) == sorted(loose.raw.values())


@pytest.mark.parametrize("replaced", ["a.jpg", "sub"])
def test_what_has_become_a_link_since_is_not_linked_to(
    loose: Labelled, tmp_path: Path, replaced: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jpg").write_bytes(b"secret")
    there = tmp_path / "source" / replaced
    there.rename(tmp_path / "moved")
    there.symlink_to(elsewhere / "a.jpg" if replaced == "a.jpg" else elsewhere)
    summary = _export(loose, tmp_path / "out", "coco", "link")
    assert (summary.images, summary.left_out) == (3, 1)
    links = [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]
    assert all(p.read_bytes() != b"secret" for p in links)


def test_links_into_a_tar_are_refused(hostile: Labelled, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inside tar shards") as caught:
        _export(hostile, tmp_path / "out", "coco", "link")
    assert "--images copy" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_is_gone_is_left_out_and_said(
    loose: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    (tmp_path / "source" / "b.jpg").unlink()
    summary = _export(loose, tmp_path / "out", format, "copy")
    assert (summary.images, summary.left_out) == (3, 1)
    assert "b.jpg" in str(summary.first_problem)
    assert READERS[format](tmp_path / "out").keys() == {"a.jpg", "sub/a.jpg", "z.png"}


def test_places_that_would_mix_are_refused(loose: Labelled, tmp_path: Path) -> None:
    for place in ("run/export", "source/export", "source"):
        with pytest.raises(ConfigError, match="overlaps"):
            _export(loose, tmp_path / place, "coco")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.txt"):
        _export(loose, tmp_path / "full", "coco")


def test_an_older_version_can_be_exported(loose: Labelled, tmp_path: Path) -> None:
    decide_run(loose.manifest, Policy(accept=0.95, reject=0.9))
    new = export_version(loose.manifest, str(tmp_path / "new"), "coco")
    old = export_version(loose.manifest, str(tmp_path / "old"), "coco", version="v0001")
    assert (new.version, old.version) == ("v0002", "v0001")
    assert new.labels < old.labels


def test_coco_has_official_ids_and_the_ignore_list_twice(loose: Labelled, tmp_path: Path) -> None:
    _export(loose, tmp_path / "out", "coco")
    loaded = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert [c["id"] for c in loaded["categories"]] == [1, 2, 3]
    crowds = [a for a in loaded["annotations"] if a["iscrowd"]]
    assert [a["bbox"] for a in loaded["ignore"]] == [a["bbox"] for a in crowds]
    assert {a["id"] for a in loaded["annotations"]} == set(range(1, 8))
    assert loaded["info"]["version"] == "v0001"


def test_our_own_evaluation_reads_the_coco_export(loose: Labelled, tmp_path: Path) -> None:
    _export(loose, tmp_path / "out", "coco")
    truth = read_truth(tmp_path / "out" / "annotations.json")
    assert len(truth.images) == 4


def test_coco_tools_load_and_evaluate_the_export(loose: Labelled, tmp_path: Path) -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    _export(loose, tmp_path / "out", "coco")
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
    _export(loose, tmp_path / "out", "yolo", "copy")
    described = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    assert described["names"] == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert (tmp_path / "out" / "labels" / "b.txt").read_text() == ""
    images = {p.stem for p in (tmp_path / "out" / "images").iterdir()}
    labels = {p.stem for p in (tmp_path / "out" / "labels").iterdir()}
    assert images == labels
    assert len(images) == 4


def test_hugging_face_features_name_the_classes(loose: Labelled, tmp_path: Path) -> None:
    _export(loose, tmp_path / "out", "hf", "copy")
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
    _export(loose, tmp_path / "coco", "coco", "copy")
    _export(loose, tmp_path / "yolo", "yolo", "copy")
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

"""Exports: what a version holds comes back from every format, inside its folder and loadable."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.exports.export import ExportFormat, ExportRequest, ExportSummary, export_version
from pipelines.exports.file_names import FileNames
from pipelines.exports.place import ExportPlace
from pipelines.labels.decide import decide_run
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
from storage.shards.selecting import IMAGE_SUFFIXES, group_images, tar_shards
from storage.stores.local_files import LOCK_NAME
from storage.stores.open import open_store
from tests.support.samples.image_samples import picture
from tests.support.samples.review_runs import distinct_row
from tests.support.samples.synthetic_run import boxes, commit_rows, make_run
from workers.images.decode import decode

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
    return export_version(labelled.manifest, str(dest), ExportRequest(format, images=images))  # type: ignore[arg-type]


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
        assert not any(row["objects"]["ignore"])
        found[row["image_id"]] = [
            ((x, y, x + w, y + h), label, ignore)
            for o in (row["objects"], row["ignored"])
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
    new = export_version(loose.manifest, str(tmp_path / "new"), ExportRequest("coco"))
    old = export_version(loose.manifest, str(tmp_path / "old"), ExportRequest("coco", "v0001"))
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
    assert "path" not in described  # a loader then takes the folder that data.yaml lies in
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


def test_a_picture_that_replaced_the_labelled_one_is_not_linked(
    loose: Labelled, tmp_path: Path
) -> None:
    (tmp_path / "source" / "a.jpg").write_bytes(jpeg(200) + b" ")
    for mode in ("copy", "link"):
        summary = _export(loose, tmp_path / mode, "coco", mode)
        assert (summary.images, summary.left_out) == (3, 1)
        assert "'a.jpg'" in str(summary.first_problem)


def test_a_rewrite_of_the_same_size_is_not_linked_either(loose: Labelled, tmp_path: Path) -> None:
    path = tmp_path / "source" / "a.jpg"
    path.write_bytes(b"x" * path.stat().st_size)
    assert _export(loose, tmp_path / "out", "yolo", "link").left_out == 1


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


def test_gifs_and_every_other_suffix_of_a_source_are_kept() -> None:
    for suffix in IMAGE_SUFFIXES:
        assert FileNames(flat=True).name(f"sub/a.b{suffix}") == f"sub_a.b{suffix}"
        assert FileNames(flat=True).name(f"a{suffix}#2").endswith(suffix)


def test_coco_says_who_labelled_and_when(loose: Labelled, tmp_path: Path) -> None:
    _export(loose, tmp_path / "out", "coco")
    images = json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]
    said = {i["labelfleet"]["source"]: i["labelfleet"] for i in images}
    assert said["human"]["annotator"] == "ann"
    assert said["human"]["labelled_at"] == "2026-01-01T00:00:00+00:00"
    assert said["model"]["annotator"] is None
    (row,) = [r for r in pq.read_table(_hf(loose, tmp_path)).to_pylist() if r["source"] == "human"]
    assert (row["annotator"], row["labelled_at"]) == ("ann", datetime(2026, 1, 1, tzinfo=UTC))


def _hf(labelled: Labelled, tmp_path: Path) -> Path:
    _export(labelled, tmp_path / "hf", "hf")
    return tmp_path / "hf" / "data"


def test_pycocotools_and_supervision_read_every_box(loose: Labelled, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import supervision as sv
    from pycocotools.coco import COCO

    dest = tmp_path / "out"
    _export(loose, dest, "coco", "copy")
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
    _export(loose, yolo, "yolo", "copy")
    data = sv.DetectionDataset.from_yolo(
        str(yolo / "images"), str(yolo / "labels"), str(yolo / "data.yaml")
    )
    assert sum(len(found) for _, _, found in data) == 5


def test_formats_that_few_readers_know_are_copied_as_png(tmp_path: Path) -> None:
    import pillow_heif

    (tmp_path / "run").mkdir()
    folder = tmp_path / "source"
    folder.mkdir()
    image = Image.fromarray(picture(48, 64))
    pillow_heif.from_pillow(image).save(folder / "a.heic", quality=-1)
    image.save(folder / "b.jp2")
    image.save(folder / "c.avif", quality=100)
    image.save(folder / "d.jpg")
    (shard,) = group_images(list(open_store(str(folder)).list()), 100)
    labelled = _labelled(tmp_path, shard)
    formats: tuple[ExportFormat, ...] = ("coco", "yolo")
    for written in formats:
        dest = tmp_path / written
        summary = _export(labelled, dest, written, "copy")
        assert (summary.left_out, summary.turned_upright) == (0, 3)
        for name in ("a.heic", "b.jp2", "c.avif"):
            (copy,) = dest.rglob(f"{name}.png")
            seen = cv2.imread(str(copy))
            assert seen is not None
            pixels = decode((folder / name).read_bytes(), max_pixels=10**6).pixels
            np.testing.assert_array_equal(seen[..., ::-1], pixels)
        (kept,) = dest.rglob("d.jpg")
        assert kept.read_bytes() == (folder / "d.jpg").read_bytes()
    assert (tmp_path / "yolo" / "labels" / "a.heic.txt").is_file()


def test_a_turned_image_is_copied_upright(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = tmp_path / "source"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored = np.zeros((64, 48, 3), np.uint8)
    stored[:20] = (250, 0, 0)  # the top as stored is the right side upright
    for name in ("a.jpg", "b.png", "c.webp"):
        quality = {"lossless": True} if name == "c.webp" else {"quality": 95}
        Image.fromarray(stored).save(folder / name, exif=exif, **quality)
    (folder / "d.jpg").write_bytes(jpeg(9))
    (shard,) = group_images(list(open_store(str(folder)).list()), 100)
    labelled = _labelled(tmp_path, shard)
    dest = tmp_path / "out"
    summary = _export(labelled, dest, "coco", "copy")
    assert (summary.turned_upright, summary.left_out) == (3, 0)
    for name in ("a.jpg", "b.png", "c.webp"):
        with Image.open(dest / "images" / name) as opened:
            assert opened.format == {"j": "JPEG", "p": "PNG", "w": "WEBP"}[name[2]]
            assert 0x0112 not in opened.getexif()
            pixels = np.asarray(opened.convert("RGB"), np.int64)
        assert pixels.shape == (48, 64, 3)
        assert pixels[24, 55, 0] > 240
        assert pixels[24, 20, 0] < 10
    assert (dest / "images" / "d.jpg").read_bytes() == jpeg(9)


@pytest.mark.parametrize("format", FORMATS)
def test_a_card_says_what_the_export_is(
    loose: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    _export(loose, tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# cells, label version v0001" in card
    assert "| Licence of the model | MIT |" in card
    assert "| images | 4 |" in card
    assert "| labels | 5 |" in card
    assert "| Platelets | 2 |" in card
    assert "accept: 0.7" in card


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", ["none", "copy", "link"])
def test_a_killed_export_continues_and_ends_as_if_it_had_not_been(
    loose: Labelled, tmp_path: Path, format: ExportFormat, mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, dest = tmp_path / "whole", tmp_path / "out"
    _export(loose, whole, format, mode)
    write, link, done = ExportPlace.write, ExportPlace.link, [0]

    def killed_after_three(step: Callable[..., None]) -> Callable[..., None]:
        def act(*args: object) -> None:
            done[0] += 1
            if done[0] > 3:
                raise Killed
            step(*args)

        return act

    if format == "hf":
        monkeypatch.setattr(ExportPlace, "finish", killed_after_three(ExportPlace.finish))
        done[0] = 9
    else:
        monkeypatch.setattr(ExportPlace, "write", killed_after_three(write))
        monkeypatch.setattr(ExportPlace, "link", killed_after_three(link))
        if mode == "none" and format == "coco":
            done[0] = 9
    with pytest.raises(Killed):
        _export(loose, dest, format, mode)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unfinished export that differs in images"):
        _export(loose, dest, format, "copy" if mode == "none" else "none")
    summary = _export(loose, dest, format, mode)
    assert summary.left_out == 0
    assert _tree(dest) == _tree(whole)
    with pytest.raises(ConfigError, match="complete export of v0001 already"):
        _export(loose, dest, format, mode)


def _tree(folder: Path) -> dict[str, object]:
    return {
        str(p.relative_to(folder)): pq.read_table(p).to_pylist()
        if p.suffix == ".parquet"
        else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("export.json", LOCK_NAME)
    }


def test_copies_of_an_earlier_attempt_are_not_read_again(
    loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_card(*args: object) -> None:
        raise Killed

    dest = tmp_path / "out"
    monkeypatch.setattr(ExportPlace, "finish", no_card)
    with pytest.raises(Killed):
        _export(loose, dest, "yolo", "copy")
    monkeypatch.undo()
    for path in (tmp_path / "source").rglob("*.*"):
        path.unlink()
    summary = _export(loose, dest, "yolo", "copy")
    assert (summary.images, summary.copied_before, summary.left_out) == (4, 4, 0)


def test_the_splits_of_the_documentation_work(
    loose: Labelled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
    for_coco, for_yolo = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for kind, code in (("coco", for_coco), ("yolo", for_yolo)):
        dest = tmp_path / kind
        _export(loose, dest, kind)  # type: ignore[arg-type]
        monkeypatch.chdir(dest)
        exec(code.replace("0.1", "0.5"), {})
    parts = [json.loads((tmp_path / "coco" / f"{p}.json").read_text()) for p in ("train", "val")]
    assert sum(len(part["images"]) for part in parts) == 4
    assert sum(len(part["annotations"]) for part in parts) == 7
    lists = [(tmp_path / "yolo" / f"{p}.txt").read_text().split() for p in ("train", "val")]
    assert len(lists[0]) + len(lists[1]) == 4
    assert not set(lists[0]) & set(lists[1])
    assert [len(part["images"]) for part in parts] == [len(one) for one in lists]

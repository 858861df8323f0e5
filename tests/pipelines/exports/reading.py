"""Read an export back as it would be read by others: boxes by image id."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from tests.pipelines.exports.labelled import Labelled

Exported = list[tuple[tuple[float, ...], int, bool]]


def expected_boxes(labelled: Labelled) -> dict[str, Exported]:
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

"""Roboflow exports of the demo's pages, as its COCO download lays them out."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.demo.digits import make_pages
from pipelines.suite.splits import ANNOTATIONS

SIZES = {"train": 4, "valid": 3, "test": 6}


def write_export(folder: Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Write train, valid and test with images beside their annotations, and Roboflow's own
    category of the group, which no box has and which moves the digits' ids up by one."""
    for number, (name, images) in enumerate((sizes or SIZES).items()):
        made = make_pages(
            folder / "pages" / name, images=images, seed=10 * seed + number, broken=False
        )
        coco = json.loads(made.truth.read_text())
        coco["annotations"] = [
            a | {"category_id": a["category_id"] + 1} for a in coco["annotations"]
        ]
        digits = [{"id": c["id"] + 1, "name": c["name"], "supercategory": "digits"}
                  for c in coco["categories"]]  # fmt: skip
        coco["categories"] = [{"id": 0, "name": "digits", "supercategory": "none"}, *digits]
        split = folder / "export" / name
        made.images.rename(_parent(split))
        (split / ANNOTATIONS).write_text(json.dumps(coco))
    return folder / "export"


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

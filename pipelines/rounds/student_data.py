"""The student's training data: the label version as an exported set, with the labelled images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.exports.export import ExportRequest, export_version
from pipelines.rounds.state import StepRecord
from pipelines.rounds.work import RoundWork
from storage.runs.manifest import Manifest


def merged_set(work: RoundWork, record: StepRecord) -> dict[str, str]:
    """Export the label version, and write one COCO file over it and the labelled images."""
    decided = work.state.result("decide")
    folder = work.folder / f"{record.place}-labels"
    path, pictures = folder / "train.json", folder / "images"
    if path.exists():
        return {"annotations": str(path), "images": str(pictures)}
    pool = Manifest.open(decided["run"], work.options)
    request = ExportRequest("coco", decided["version"], "copy")
    shutil.rmtree(folder / "export", ignore_errors=True)
    export_version(pool, str(folder / "export"), request, work.options)
    labels = json.loads((folder / "export" / "annotations.json").read_bytes())
    truth = work.labelled.train
    known = json.loads(truth.annotations.read_bytes())
    ids = {c["name"]: c["id"] for c in known["categories"]}
    names = {c["id"]: c["name"] for c in labels["categories"]}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for part, fields, place, rename in (
        ("truth", known, truth.images, None),
        ("labels", labels, folder / "export" / "images", {i: ids[n] for i, n in names.items()}),
    ):
        link = folder / "images" / part
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path(place).resolve(), target_is_directory=True)
        first = len(images)
        numbers = {image["id"]: first + n for n, image in enumerate(fields["images"], 1)}
        for image in fields["images"]:
            name = f"{part}/{image['file_name']}"
            images.append({**image, "id": numbers[image["id"]], "file_name": name})
        for box in fields["annotations"]:
            category = box["category_id"] if rename is None else rename[box["category_id"]]
            made = {**box, "id": len(annotations) + 1, "category_id": category}
            annotations.append({**made, "image_id": numbers[box["image_id"]]})
    made_ = {"images": images, "annotations": annotations, "categories": known["categories"]}
    path.write_text(json.dumps(made_))
    return {"annotations": str(path), "images": str(pictures)}

"""The steps around the student: train it, and compare it with its teacher on held-out images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.evaluation.evaluate import evaluate_run
from pipelines.exports.export import ExportRequest, export_version
from pipelines.rounds.costs import gpu_seconds
from pipelines.rounds.gain import compare_on
from pipelines.rounds.labelled import digest
from pipelines.rounds.machine_steps import labelled_run, trained, training_inputs
from pipelines.rounds.state import StepName, StepRecord
from pipelines.rounds.work import RoundWork
from pipelines.training.config import TrainConfig
from storage.coco.truth import read_truth
from storage.runs.manifest import Manifest

Fields = dict[str, Any]
COMPARISON = "comparison.json"


# student


def student_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the teacher, the label version, the truth, and the recipe."""
    decided = work.state.result("decide")
    config = _training(work, record, work.labelled.train.model_dump())
    fields = training_inputs(work, config)
    fields["training"].pop("model")  # its checkpoint may lie elsewhere; the digest says which it is
    return {
        **fields,
        "teacher": work.state.result("teacher")["sha256"],
        "labels": {key: decided[key] for key in ("version", "attempt")},
        "model": {**work.config.train, **work.config.student}.get("model"),
        "truth_share": work.config.truth_share,
    }


def train_student(work: RoundWork, record: StepRecord) -> Fields:
    """Train on the label version and the labelled images."""
    return trained(work, record, _training(work, record, merged_set(work, record)))


def _training(work: RoundWork, record: StepRecord, data: Any) -> TrainConfig:
    return work.train_config("student", record, train=data, **_start(work))


def _start(work: RoundWork) -> Fields:
    """Start from the teacher's weights, where the config names no others and they can be."""
    stated = {**work.config.train, **work.config.student}
    teacher = work.state.result("teacher")["model"]
    if "model" in stated or teacher.get("family", "yolo_nas") != "yolo_nas":
        return {}
    checkpoint = work.checkpoint(teacher["checkpoint"])
    licence = work.state.result("teacher")["licence"]
    model = {"checkpoint": teacher["checkpoint"], **({"licence": licence} if licence else {})}
    model |= {"name": checkpoint.name} if checkpoint.name else {}
    size = checkpoint.image_size
    return {"model": model, **({"image_size": list(size)} if size else {})}


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


# evaluate


def evaluate_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return both models and the held-out truth."""
    return {
        "teacher": work.state.result("teacher")["sha256"],
        "student": work.state.result("student")["sha256"],
        "test": digest(work.config.test),
    }


def evaluate_both(work: RoundWork, record: StepRecord) -> Fields:
    """Label the held-out images with teacher and student, and compare."""
    data, runs = work.config.test, {}
    models: tuple[StepName, ...] = ("teacher", "student")
    for who in models:
        model = work.state.result(who)["model"]
        config = work.measuring(f"{record.place}/{who}", data, model)
        runs[who] = labelled_run(work, config)
    path = str(data.annotations)
    one, other = (evaluate_run(run, path, allow_missing=True) for run in runs.values())
    truth = read_truth(data.annotations)
    found = compare_on(runs["teacher"], runs["student"], truth, (one, other))
    work.put_json(f"{record.place}/{COMPARISON}", found.to_fields())
    return {
        "comparison": found.to_fields(),
        "teacher": one.to_fields(),
        "student": other.to_fields(),
        "runs": {who: run.url for who, run in runs.items()},
        "gpu_seconds": sum(gpu_seconds(run) for run in runs.values()),
    }

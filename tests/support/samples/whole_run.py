"""A small run that left an object of every kind: rows, listing, review, labels, model, records."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from pipelines.config.source import group_shards
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import POLICY_KEY, Policy
from pipelines.routing.route import route_run
from pipelines.runs.drift_record import DriftRecord, write_drift
from storage.coco.truth import Truth, parse_truth
from storage.objects.protocols import ObjectStore
from storage.records import Shard
from storage.review.answers import Answer, DeletedBox, ReviewedBox, append_answers
from storage.review.kept import keep_answers
from storage.review.not_shown import write_not_shown
from storage.review.queue import read_queue
from storage.review.refreshed import Refreshed, write_refreshed
from storage.review.settings import ReviewSettings, write_settings
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest, RunRecord
from storage.shards.selecting import list_source
from tests.support.samples.labelled_run import CLASSES, fill, label
from tests.support.samples.synthetic_run import record, with_inference
from tests.support.samples.tar_samples import tar_of
from workers.runtimes.artefacts import publish

POLICY = Policy(accept=0.6, reject=0.1)
KINDS = (
    "run.json", "source/", "annotations/", "ledger/", "quarantine/", "review/queue/",
    "review/frames/", "review/answers/", "review/settings.json", "labels/v0001/part-",
    "labels/v0001/lineage.json", "labels/v0001/claim.json", "labels/v0001/policy.yaml",
    "labels/v0001/answered.jsonl", "labels/v0001/alternatives.jsonl",
    "labels/v0001/set_aside.jsonl", "labels/latest.json",
    "model/", "policy.yaml", "review/gold/", "review/not_shown.json", "review/refreshed.json",
    "review/kept.json", "left_out.json", "report/drift.json",
)  # fmt: skip


def whole_run(source: ObjectStore, output: ObjectStore) -> Manifest:
    """Label, route twice, answer, decide twice; a later listing dropped and changed images."""
    fill(source)
    record_ = with_artefact(output, record(CLASSES, source.url))
    label(source, output, record_=record_)
    source.delete("loose/004.png")
    source.put("loose/zzz.png", source.get("loose/000.png") + b"more")
    manifest = label(source, output, record_=record_)
    output.put(POLICY_KEY, POLICY.to_yaml().encode())
    write_settings(output, ReviewSettings(project="cells"))
    for invocation, image in (("i1", "loose/002.png"), ("i2", "loose/003.png")):
        route_run(
            manifest, budget="4 images", policy=POLICY, invocation=invocation, audit=0.5,
            gold=1, gold_truth=_truth(image),
        )  # fmt: skip
        _answer(manifest, invocation)
        decide_run(manifest, POLICY, rows_per_part=5)
    _leave_notes(manifest)
    manifest.set_aside(_unlabelled(source, output), ["ShardFailed: poison"], "i")
    return manifest


def _truth(name: str) -> Truth:
    """Return ground truth of one image."""
    fields = {
        "images": [{"id": 1, "file_name": name, "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 9]}],
        "categories": [{"id": 1, "name": "bright"}],
    }
    return parse_truth(json.dumps(fields).encode(), "truth.json")


def _leave_notes(manifest: Manifest) -> None:
    """Write the single records that a push, a refresh, a listing and a comparison leave."""
    store = manifest.store
    keep_answers(store, {("7@2026-01-01", "ef" * 32, 3, 4), ("7@2026-01-01", "01" * 32, 5, 6)})
    write_not_shown(store, {"ab" * 32: "its link cannot be made", "cd" * 32: "it is gone"})
    write_refreshed(store, Refreshed("2026-01-01T00:00:00+00:00", {"accept": 0.5}, {}, {"a": "b"}))
    manifest.note_left_out({".txt": 3, ".json": 1})
    drift = DriftRecord("2026-01-01T00:00:00+00:00", "The images are as before.", 0, 1, 2)
    write_drift(store, drift)


def with_artefact(output: ObjectStore, made: RunRecord) -> RunRecord:
    """Return the same record, for a runtime that loads an artefact below the run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(bytes(range(256)) * 8)
        ref = publish(output, "model/0123", {"model.onnx": path}, "model.onnx", {"runtime": "onnx"})
    place = {"key": "model/0123/artefact.json", "sha256": ref.sha256}
    return with_inference(made, artefact=place)


def _unlabelled(source: ObjectStore, output: ObjectStore) -> Shard:
    """Return a tar that is listed and has no rows."""
    before = {shard.shard_id for shard in Listing(output).live_shards()}
    source.put("tars/poison.tar", tar_of(("1.png", b"no picture")))
    Listing(output).refresh(list_source(source), lambda objects: group_shards(objects, 2))
    (new,) = (s for s in Listing(output).live_shards() if s.shard_id not in before)
    return new


def _answer(manifest: Manifest, invocation: str) -> None:
    at = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
    answers = [
        Answer(
            image_id=item.image_id,
            sha256=item.sha256,
            task_id=number,
            annotation_id=number,
            annotator="a@example.org",
            lead_time_s=3.5,
            submitted_at=at.replace(minute=number),
            skipped=False,
            boxes=(ReviewedBox((1.0, 2.0, 3.0, 4.0), "dark", "kept", 0.5),),
            deleted=(DeletedBox((1.0, 2.0, 3.0, 4.0), "bright", 0.25),),
            model_version="m",
            was_blind=False,
        )
        for number, item in enumerate(read_queue(manifest.store))
    ]
    append_answers(manifest.store, answers[:-1])

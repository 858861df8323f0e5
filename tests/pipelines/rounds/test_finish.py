"""A student that loses much in INT8 is finished, and the round's step says what that brought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config.yaml_files import parse_config
from pipelines.demo.digits import make_pages
from pipelines.dispatch.stopping import Stopper
from pipelines.dispatch.tally import Caller, Unwatched
from pipelines.rounds.round import Selection, run_round
from pipelines.rounds.round_config import CompilePart, FinishPart, RoundConfig
from pipelines.rounds.state import RoundState, StepName, StepRecord
from pipelines.rounds.steps.compiling import (
    compile_inputs,
    finish_config,
    finish_steps,
    kept_of,
    may_help,
)
from pipelines.rounds.work import RoundWork
from pipelines.training.config import TrainConfig
from storage.errors import Interrupted
from storage.stores.open import open_store
from tests.support.samples.training_samples import box, write_coco
from workers.checkpoints.description import Description
from workers.checkpoints.file import read_checkpoint, save_checkpoint
from workers.compile.quantize import GROUPS, RECIPE

MEASURED = {"loss": 0.2, "agreement": 0.95, "min_agreement": 0.9}
MADE = {"model": {"checkpoint": "f"}, "sha256": "b", "summary": {"steps": 70, "seconds": 9.0}}


def refused(**measured: float) -> dict[str, Any]:
    return {"refused": "it loses", "hint": None, "measured": {**MEASURED, **measured}}


def test_a_finish_is_tried_for_what_was_seen_to_be_lost() -> None:
    assert may_help(refused(loss=0.7), 0.5)
    assert may_help(refused(agreement=0.8), 0.5)
    assert not may_help(refused(loss=0.4), 0.5)  # only the interval is wide: images would help
    assert not may_help({"refused": "fp32 finds nothing", "hint": None}, 0.5)
    assert not may_help({"refused": None, "facts": {}}, 0.5)


def test_what_passes_is_kept_and_both_are_told() -> None:
    before, facts = refused(loss=3.0), {"measured": {**MEASURED}}
    passed = kept_of(before, {"refused": None, "facts": facts, "artefact": "a"}, MADE)
    assert (passed["refused"], passed["artefact"]) == (None, "a")
    assert passed["finish"]["kept"]
    assert passed["finish"]["before"]["loss"] == 3.0
    assert (passed["finish"]["steps"], passed["finish"]["seconds"]) == (70, 9.0)
    failed = kept_of(before, refused(loss=0.7), MADE)
    assert (failed["refused"], failed["measured"]["loss"]) == ("it loses", 3.0)
    assert not failed["finish"]["kept"]
    assert failed["finish"]["measured"]["loss"] == 0.7


def data(folder: Path) -> dict[str, str]:
    truth = write_coco(folder, [(32, 32)] * 2, [box(1, 7, 1, 1, 9, 9)])
    return {"annotations": str(truth), "images": str(truth.parent)}


def test_a_finish_is_a_short_training_of_the_student(tmp_path: Path) -> None:
    held = data(tmp_path / "truth")
    fields = {
        "name": "cells", "output": str(tmp_path), "train": held, "val": held, "epochs": 3,
        "augment": {"mosaic": 0.5, "scale": [0.9, 1.1]}, "distill": {"mode": "stored"},
        "lr": 1e-3, "batch_size": 4, "image_size": 320, "model": {"licence": "MIT"},
    }  # fmt: skip
    training = parse_config(TrainConfig, fields, where="test")
    student = {"summary": {"steps": 900}, "model": {"checkpoint": "s.safetensors"}}
    made = finish_config(training, FinishPart(), student, "onnx")
    assert (made.int8, made.steps, made.epochs, made.eval_every) == ("onnx", 90, None, 90)
    assert made.lr == pytest.approx(5e-5)
    assert (made.augment.mosaic, made.augment.scale) == (0.0, (0.9, 1.1))
    assert (made.batch_size, made.image_size, made.distill) == (4, 320, None)
    assert (made.model.checkpoint, made.model.licence) == ("s.safetensors", "MIT")
    assert [finish_steps(n) for n in (10, 3000, 10**6)] == [50, 300, 2000]


def round_config(folder: Path, part: dict[str, Any], **more: Any) -> RoundConfig:
    fields = {
        "name": "digits", "output": str(folder / "out"), "pool": {"url": str(folder / "pool")},
        "compile": part, **more,
    }  # fmt: skip
    return parse_config(RoundConfig, fields, where="round")


def left(config: RoundConfig, step: StepName, result: dict[str, Any]) -> None:
    RoundState(open_store(config.output)).write(StepRecord(step, "done", 1, {}, result))


def test_records_of_rounds_that_knew_no_finish_stay_valid(tmp_path: Path) -> None:
    held = data(tmp_path / "truth")
    sets = {"truth": held, "val": held, "test": held}
    inputs = {}
    for name, part in {"default": {}, "none": {"finish": None}}.items():
        asked = round_config(tmp_path / name, part, **sets)
        left(asked, "student", {"sha256": "a"})
        record = StepRecord("compile", "begun", 1, {})
        inputs[name] = compile_inputs(RoundWork.of(asked), record)["compile"]
    assert inputs["default"].keys() == CompilePart.model_fields.keys() - {"finish"}
    assert inputs["none"] == {**inputs["default"], "finish": None}


def hard_to_quantise(checkpoint: Path, made: Path) -> Path:
    """Write the same function with one activation of the stem ten times as large as it was."""
    found = read_checkpoint(checkpoint)
    state = {name: value.float() for name, value in found.load_state_dict().items()}
    for name in ("weight", "bias"):
        state[f"backbone.stem.conv.post_bn.{name}"][0] *= 10
    for name in ("branch_3x3.conv", "branch_1x1"):
        state[f"backbone.stage1.downsample.{name}.weight"][:, 0] /= 10
    assert found.classes is not None
    assert found.preprocessing is not None
    told = Description(
        name=found.name or "", arch_params=found.arch_params, classes=found.classes,
        preprocessing=found.preprocessing, licence="MIT", provenance=None,
        official_ids=found.official_ids, training={},
    )  # fmt: skip
    save_checkpoint(made, state, told)
    return made


class Noting(Unwatched):
    """A Watcher that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_round_finishes_its_student_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano_checkpoint: Path
) -> None:
    monkeypatch.setenv("LABELFLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("workers.compile.quantize.GROUPS", {n: GROUPS[n] for n in RECIPE})
    pages = make_pages(tmp_path / "pages", images=28, seed=9, split="unseen", broken=False)
    labelled = json.loads(pages.truth.read_text())
    sets = {}
    for name, images in (("val", labelled["images"][:10]), ("truth", labelled["images"][10:])):
        ids = {image["id"] for image in images}
        kept = [a for a in labelled["annotations"] if a["image_id"] in ids]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**labelled, "images": images, "annotations": kept}))
        sets[name] = {"annotations": str(path), "images": str(pages.images)}
    finish = {"steps": 6, "lr": 1e-4}
    part = {"runtime": "openvino", "max_loss": 0.0, "finish": finish}
    asked = round_config(tmp_path, part, **sets, test=sets["val"])
    student = hard_to_quantise(nano_checkpoint, tmp_path / "student.safetensors")
    model = {"checkpoint": str(student)}
    left(asked, "student", {"model": model, "sha256": "a", "summary": {"steps": 100}})
    fields = {
        "name": "digits", "output": str(tmp_path / "out/work/compile"), "train": sets["truth"],
        "val": sets["val"], "steps": 100, "image_size": 320, "batch_size": 2,
        "augment": {"flip_horizontal": 0}, "threads": 1, "device": "cpu",
    }  # fmt: skip
    training = parse_config(TrainConfig, fields, where="test")
    where = "pipelines.rounds.steps.compiling.student_training"
    monkeypatch.setattr(where, lambda work, record: training)

    stopper, noting = Stopper(), Noting()
    stopper.request()
    with pytest.raises(Interrupted, match=r"stopped at step 1 of 6"):
        run_round(asked, Selection(only="compile"), caller=Caller(noting, stopper))
    assert sum(note.startswith("INT8 but ") for note in noting.notes) == 1
    noting = Noting()
    run_round(asked, Selection(only="compile"), caller=Caller(noting))
    assert sum(note.startswith("INT8 but ") for note in noting.notes) == 1  # the finished one's

    result = RoundState(open_store(asked.output)).result("compile")
    told = result["finish"]
    assert told["steps"] == 6
    assert {told["measured"]["images"], told["before"]["images"]} == {10}
    assert told["measured"]["fp32_map"] == told["before"]["fp32_map"]  # of the same float32 model
    assert told["kept"] == (result["refused"] is None)
    finished = read_checkpoint(Path(told["model"]["checkpoint"].removeprefix("file://")))
    assert finished.training is not None
    assert "quantization-aware finish" in finished.training["int8"]
    weights, before = finished.load_state_dict(), read_checkpoint(student).load_state_dict()
    assert weights.keys() == before.keys()
    key = "backbone.stage1.downsample.branch_1x1.weight"
    assert torch.equal(weights[key].half(), before[key].half())  # the 3×3 branch took all

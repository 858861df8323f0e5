"""The page of a round: the verdict, the pictures, the licences; and what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.yaml_files import parse_config
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.rounds.gain import Comparison, compare_on
from pipelines.rounds.page import render_page
from pipelines.rounds.round_config import RoundConfig
from pipelines.rounds.state import StepName, StepRecord
from pipelines.rounds.work import RoundWork
from storage.coco.truth import read_truth
from storage.records import Detections
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.review_samples import SIZE, loose_run
from tests.support.samples.synthetic_run import boxes

IMAGES = 6
HOSTILE = "<script>document.title='ran'</script>"
TRUE = [(20.0, 30.0, 100.0, 90.0), (150.0, 100.0, 220.0, 180.0)]


def all_found(at: int) -> Detections:
    return boxes(TRUE, [0.95 - at / 100, 0.9], [0, 1])


def half_found(at: int) -> Detections:
    return boxes([TRUE[0], (150, 20, 220, 60)], [0.95 - at / 100, 0.6], [0, 1])


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    names = ("RBC", "WBC", "Platelets")
    fields = {
        "images": [
            {"id": n + 1, "file_name": f"{n:05d}.jpg", "width": SIZE[0], "height": SIZE[1]}
            for n in range(IMAGES)
        ],
        "annotations": [
            {"id": 2 * n + k + 1, "image_id": n + 1, "category_id": k,
             "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            for n in range(IMAGES)
            for k, (x1, y1, x2, y2) in enumerate(TRUE)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
    }  # fmt: skip
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(fields))
    return path


def compared(truth: Path, folder: Path, *, won: bool) -> tuple[Comparison, dict[str, Manifest]]:
    """Two runs over the same images, one of which finds half."""
    sides = {"teacher": half_found, "student": all_found}
    runs = {
        who: loose_run(
            open_store(str(folder / f"source-{who}")), open_store(str(folder / who)), IMAGES,
            found=found if won else sides["teacher" if who == "student" else "student"],
        )
        for who, found in sides.items()
    }  # fmt: skip
    figures = [evaluate_run(run, truth) for run in runs.values()]
    found = compare_on(
        runs["teacher"], runs["student"], read_truth(truth), (figures[0], figures[1])
    )
    return found, runs


def done(step: StepName, **result: Any) -> StepRecord:
    return StepRecord(step, "done", 1, {}, result, 60.0, reason="")


def page(truth: Path, folder: Path, records: list[StepRecord]) -> str:
    data = {"annotations": str(truth), "images": str(folder / "source")}
    fields = {"name": "cells", "output": str(folder / "out"), "pool": {"url": "pool"},
              "truth": data, "test": data}  # fmt: skip
    work = RoundWork.of(parse_config(RoundConfig, fields, where="test"))
    assert render_page(work, records, 0.0).endswith("/out/round.html")
    return (folder / "out" / "round.html").read_text()


def evaluated(found: Comparison, runs: dict[str, Manifest]) -> StepRecord:
    urls = {who: run.url for who, run in runs.items()}
    return done("evaluate", comparison=found.to_fields(), runs=urls)


def test_a_student_that_won(truth: Path, tmp_path: Path) -> None:
    found, runs = compared(truth, tmp_path, won=True)
    assert found.overall.verdict == "better"
    assert found.overall.teacher == pytest.approx(50, abs=1)
    assert found.overall.student == pytest.approx(100)
    assert [(g.name, g.objects) for g in found.sizes] == [
        ("small", 0), ("medium", 2 * IMAGES), ("large", 0)
    ]  # fmt: skip
    by_class = {g.name: g for g in found.classes}
    assert by_class["RBC"].gain == pytest.approx(0)
    assert by_class["WBC"].gain == pytest.approx(100, abs=1)
    assert by_class["Platelets"].gain is None
    assert (len(found.better), found.worse) == (IMAGES, ())
    teacher = {"role": "labels", "checkpoint": HOSTILE, "sha256": "ab", "licence": "CC-BY-NC-4.0"}
    curve = {"history": [[1, 3.0, 0.2], [2, 2.0, 0.4]]}
    counts = {"images_model": 30, "images_human": 10, "labels": 7, "rejected": 1}
    html = page(
        truth,
        tmp_path,
        [
            done("teacher", summary=curve),
            done("label", gpu_seconds=7200.0),
            done("pull", human_minutes=12.5),
            done(
                "decide", version="v0001", counts=counts, guarantee="", not_proven="",
                by_class={HOSTILE: {"model": 5, "human": 2, "ignored": 3}},
            ),
            done(
                "student", summary=curve, licence="MIT; learned from weights under CC-BY-NC-4.0",
                provenance={"ancestors": [teacher]},
            ),
            evaluated(found, runs),
            done("compile", refused="it loses 3.1 points", precision="int8", hint=None),
        ],
    )  # fmt: skip
    assert "The student beats its teacher: 100.0 against" in html
    assert html.count('<img src="data:image/jpeg') == 3 * IMAGES
    assert "The student is right and the teacher was not" in html
    assert "The teacher was right and the student is not" not in html
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "Not for commercial use." in html
    assert html.count("<svg") == 3
    assert "25.0" in html  # percent of the images by people
    assert "2.00 GPU hours" in html
    assert "12.5 minutes" in html
    assert "it loses 3.1 points" in html
    assert "No quantization-aware finish was tried" in html


def test_a_finish_is_told_with_what_int8_lost_before_it(truth: Path, tmp_path: Path) -> None:
    def lost(loss: float) -> dict[str, Any]:
        return {"loss": loss, "loss_interval": [loss - 0.1, loss + 0.1], "agreement": 0.95,
                "images": 40, "against": "fp32"}  # fmt: skip

    finish = {"kept": True, "refused": None, "before": lost(3.1), "measured": lost(0.2),
              "steps": 70, "seconds": 90.0, "model": {"checkpoint": HOSTILE}}  # fmt: skip
    compiled = {"refused": None, "runtime": "openvino", "precision": "int8", "artefact": "a",
                "facts": {"measured": lost(0.2)}}  # fmt: skip
    html = page(truth, tmp_path, [done("compile", **compiled, finish=finish)])
    assert "+3.10" in html
    assert "+0.10 to +0.30" in html
    assert "after a finish of 70 steps" in html
    assert html.count("<td>kept</td>") == 1
    refused = {"refused": "it loses", "hint": None, "precision": "int8", "measured": lost(3.1)}
    not_kept = {**finish, "kept": False, "refused": "it loses 2 points"}
    html = page(truth, tmp_path, [done("compile", **refused, finish=not_kept)])
    assert "It did not pass: it loses 2 points" in html
    assert "<td>kept</td>" not in html
    failed = {"kept": False, "refused": "the loss became nan", "measured": None}
    html = page(truth, tmp_path, [done("compile", **refused, finish=failed)])
    assert "A finish for INT8 failed: the loss became nan" in html


def test_a_student_that_did_not_win_is_told_plainly(truth: Path, tmp_path: Path) -> None:
    found, runs = compared(truth, tmp_path, won=False)
    assert (found.better, len(found.worse)) == ((), IMAGES)
    html = page(truth, tmp_path, [evaluated(found, runs)])
    assert "The student did not win, it is worse than its teacher" in html
    assert "The teacher was right and the student is not" in html
    assert "What the labels were" not in html
    assert "No person took part." in html


def test_images_that_are_gone_leave_the_figures(truth: Path, tmp_path: Path) -> None:
    found, runs = compared(truth, tmp_path, won=True)
    for image in tmp_path.glob("source-*/*.jpg"):
        image.unlink()
    html = page(truth, tmp_path, [evaluated(found, runs)])
    assert "The student beats its teacher" in html
    assert "<img" not in html


def test_without_an_evaluation_it_says_so(truth: Path, tmp_path: Path) -> None:
    skipped = StepRecord("evaluate", "skipped", 1, {}, reason="skip lists evaluate")
    html = page(truth, tmp_path, [done("student", licence="unstated"), skipped])
    assert "Teacher and student were not compared" in html
    assert "skip lists evaluate" in html

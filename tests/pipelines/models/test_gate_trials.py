"""The gate on real models and real or drawn images, each setting broken on purpose."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.demo.digits import Pages, make_pages
from pipelines.evaluation.gate import GateResult
from pipelines.labelling.open_run import open_run
from pipelines.models.gate_trials import gate_from_file
from storage.errors import BelowTheMark, ConfigError
from tests.support.samples.tiny_run import run_config, run_fields

MARK = 0.5  # of the digits; the model reaches more


LONG = pytest.mark.skipif(
    not os.environ.get("LABELFLEET_LONG"), reason="takes half an hour: `make gates` runs it"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    folder = tmp_path_factory.mktemp("pages")
    return make_pages(folder, images=8, seed=9, split="unseen", broken=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELFLEET_CACHE", str(tmp_path / "cache"))


def gated(folder: Path, fields: dict[str, Any], truth: object, min_map: float) -> GateResult:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return gate_from_file(str(path), (), str(truth), min_map)


@pytest.mark.slow
def test_a_model_that_is_set_up_well_passes(
    pages: Pages, nano_checkpoint: Path, tmp_path: Path
) -> None:
    fields = run_fields(pages.images, tmp_path / "out", nano_checkpoint)
    found = gated(tmp_path, fields, pages.truth, MARK)
    assert found.passed
    assert (found.images, found.trials) == (8, ())
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.slow
def test_classes_that_the_model_lacks_are_named(
    pages: Pages, nano_checkpoint: Path, tmp_path: Path
) -> None:
    named = json.loads(pages.truth.read_text())
    for category in named["categories"]:
        if category["name"] in ("3", "7"):
            category["name"] = f"[b]{category['name']}[/b]"
    named["categories"] += [{"id": 90, "name": "without a box"}, {"id": 91, "name": "DontCare"}]
    named["annotations"].append({**named["annotations"][0], "id": 10**6, "category_id": 91})
    truth = tmp_path / "named.json"
    truth.write_text(json.dumps(named))
    fields = run_fields(pages.images, tmp_path / "out", nano_checkpoint)
    found = gated(tmp_path, fields, truth, 0.1)
    assert found.unknown_to_model == ("[b]3[/b]", "[b]7[/b]")
    assert "without the classes that the model lacks ([b]3[/b], [b]7[/b]): passes" in found.verdict
    assert found.to_fields()["unknown_to_model"] == ["[b]3[/b]", "[b]7[/b]"]
    assert gated(tmp_path, fields, pages.truth, 0.1).unknown_to_model == ()


def renamed(truth: Path, path: Path) -> Path:
    """The ground truth with the names of two digits exchanged."""
    fields = json.loads(truth.read_text())
    other = {"3": "7", "7": "3"}
    for category in fields["categories"]:
        category["name"] = other.get(category["name"], category["name"])
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_exchanged_classes_and_a_wrong_size_are_named(
    pages: Pages, nano_checkpoint: Path, tmp_path: Path
) -> None:
    fields = run_fields(pages.images, tmp_path / "out", nano_checkpoint)
    truth = renamed(pages.truth, tmp_path / "renamed.json")
    plain = gated(tmp_path, fields, pages.truth, MARK).map_
    found = gated(tmp_path, fields, truth, plain - 0.01)
    assert not found.passed
    assert found.cause is not None
    assert found.cause.setting == "classes"
    assert found.cause.map_ == pytest.approx(plain, abs=0.02)
    assert "3 → 7" in found.advice

    fields["model"]["image_size"] = 640  # the model was trained with 320
    found = gated(tmp_path, fields, pages.truth, plain - 0.01)
    assert found.cause is not None
    assert (found.passed, found.cause.setting) == (False, "image_size")
    at_320 = next(trial for trial in found.would_pass if "320 × 320" in trial.change)
    assert at_320.map_ == pytest.approx(plain, abs=1e-6)
    assert at_320.remedy == "`model.image_size: 320`"


@pytest.mark.slow
def test_a_run_is_refused_before_it_exists(
    pages: Pages, nano_checkpoint: Path, tmp_path: Path
) -> None:
    gate = {"truth": str(pages.truth), "min_map": 0.999}
    config = run_config(pages.images, tmp_path / "out", nano_checkpoint, gate=gate)
    with pytest.raises(BelowTheMark, match=r"below the 0\.999 that is asked for") as refused:
        open_run(config, cuda=False)
    assert refused.value.exit_code == 4
    assert not (tmp_path / "out" / "run.json").exists()
    low = run_config(
        pages.images, tmp_path / "out", nano_checkpoint, gate={**gate, "min_map": MARK}
    )
    notes: list[str] = []
    open_run(low, cuda=False, note=notes.append)
    assert any("passes 0.5" in note for note in notes)
    assert (tmp_path / "out" / "run.json").exists()
    open_run(low, cuda=False, note=notes.append)
    assert "created before" in notes[-1]


def test_without_a_mark_there_is_one_line(
    pages: Pages, nano_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_fields(pages.images, tmp_path / "out", nano_checkpoint)))
    with pytest.raises(ConfigError, match="has no `gate` section"):
        gate_from_file(str(path), (), None, 0.5)


# bccd_nano was trained with RGB, RBC WBC Platelets, the aspect kept, at 320.
RIGHT = {"size": 320, "channels": "RGB"}
BROKEN: dict[str, dict[str, Any]] = {
    "channels": {"preprocessing": {**RIGHT, "channels": "BGR"}},
    "classes": {"classes": ["WBC", "RBC", "Platelets"]},
    "letterbox": {"preprocessing": {**RIGHT, "resize": "stretch"}},
    "image_size": {"image_size": 640},
}


@LONG
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_settings_broken_on_blood_cells(
    data_dir: Path, models_dir: Path, tmp_path: Path
) -> None:
    truth, images = data_dir / "bccd/val.json", data_dir / "bccd/images"
    model = {
        "arch": str(models_dir / "bccd_nano_arch.yaml"), "image_size": 320,
        "classes": ["RBC", "WBC", "Platelets"], "score_floor": 0.01,
    }  # fmt: skip
    checkpoint = models_dir / "bccd_nano.safetensors"

    def at(mark: float, **broken: Any) -> GateResult:
        section = {**model, **broken}
        if "preprocessing" in broken:
            del section["image_size"]
        fields = run_fields(images, tmp_path / "out", checkpoint, model=section)
        return gated(tmp_path, fields, truth, mark)

    whole = at(0.5)
    assert whole.passed
    named = 0
    for setting, broken in BROKEN.items():
        found = at(whole.map_ - 0.01, **broken)
        assert not found.passed, setting
        named += found.cause is not None and found.cause.setting == setting
    assert named >= 3


@LONG
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_yolox_with_rgb_by_mistake_is_refused(
    data_dir: Path, models_dir: Path, tmp_path: Path
) -> None:
    entry = {"size": 416, "place": "top_left", "scale": 1.0, "rounding": "down"}
    model = {
        "family": {"base": "yolox", "input": {**entry, "channels": "RGB"}},
        "classes": "coco", "runtime": "onnx", "score_floor": 0.01,
    }  # fmt: skip
    photos = data_dir / "coco_ccby"
    fields = run_fields(
        photos / "images", tmp_path / "out", models_dir / "yolox_nano.onnx", model=model
    )
    found = gated(tmp_path, fields, photos / "instances.json", 0.33)
    assert found.map_ == pytest.approx(0.291, abs=0.003)
    assert found.cause is not None
    assert (found.passed, found.cause.setting) == (False, "channels")
    assert found.cause.map_ == pytest.approx(0.354, abs=0.003)

"""A view of the same model is a run of its own: turned back, recorded, compared, fused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.config.run_config import RunConfig
from pipelines.demo.digits import make_pages
from pipelines.demo.run import checkpoint_path
from pipelines.evaluation.compare import compare_runs
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.fusion.fuse import fuse_runs
from pipelines.labelling.open_run import open_run
from pipelines.labelling.plan import plan_run
from pipelines.labelling.work import find_work
from pipelines.policy.fit import fit_run
from pipelines.runs.verify import verify_run
from storage.coco.truth import read_truth
from storage.errors import ConfigError, RunMismatch
from storage.records import AnnotationRow
from storage.runs.live_rows import live_rows
from storage.runs.manifest import RUN_KEY, Manifest
from storage.stores.open import open_store
from tests.support.samples.tiny_run import run_config
from workers.labelling.assemble import open_labeller
from workers.spec import WorkerSpec

PAGES = 12


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's pages, their mirror images, and ground truth."""
    folder = tmp_path_factory.mktemp("views")
    made = make_pages(folder / "made", images=PAGES, seed=3)
    (folder / "truth.json").write_text(made.truth.read_text())
    mirrored = folder / "mirrored"
    mirrored.mkdir()
    (folder / "plain").mkdir()
    for image in json.loads(made.truth.read_text())["images"]:
        name = image["file_name"]
        pixels = np.asarray(Image.open(made.images / name).convert("RGB"))
        for place, seen in (("plain", pixels), ("mirrored", pixels[:, ::-1])):
            with (folder / place / name).open("wb") as file:  # PNG, whatever the name says
                Image.fromarray(seen).save(file, "PNG")
    return folder


def labelled(config: RunConfig) -> Manifest:
    """Label what is left of a run, in this process."""
    run = open_run(config, cuda=False)
    spec = WorkerSpec(run.model, run.source.url, run.manifest.url)
    labeller = open_labeller(spec)
    try:
        for number, shard in enumerate(find_work(run, config, None).shards):
            labeller.label(shard, f"try-{number}")
    finally:
        labeller.close()
    return run.manifest


def config_of(folder: Path, source: str, output: str, **model: Any) -> RunConfig:
    return run_config(
        folder / source, folder / output, checkpoint_path(), model={"score_floor": 0.1, **model}
    )


@pytest.fixture(scope="module")
def runs(pages: Path) -> dict[str, Manifest]:
    ways: dict[str, dict[str, Any]] = {
        "usual": {}, "flip": {"view": {"flip": True}},
        "small": {"view": {"flip": True, "scale": 0.75}},
    }  # fmt: skip
    made = {name: labelled(config_of(pages, "plain", name, **way)) for name, way in ways.items()}
    made["mirror"] = labelled(config_of(pages, "mirrored", "mirror"))
    return made


def rows(manifest: Manifest) -> Iterator[AnnotationRow]:
    return iter(sorted(live_rows(manifest), key=lambda row: row.image_id))


@pytest.mark.slow
def test_a_mirrored_view_has_the_boxes_of_the_mirrored_image(runs: dict[str, Manifest]) -> None:
    """Same pixels into the network, so the same anchors and scores; boxes and spread turned."""
    boxes = 0
    for seen, mirror in zip(rows(runs["flip"]), rows(runs["mirror"]), strict=True):
        sure = seen.detections.scores > 0.3
        found, other = seen.detections, mirror.detections
        assert sure.sum() == (other.scores > 0.3).sum()
        for at in np.flatnonzero(sure):
            x0, y0, x1, y1 = found.boxes[at]
            turned = np.array([seen.width - x1, y0, seen.width - x0, y1])
            far = np.abs(other.boxes - turned).max(axis=1)
            far[other.category_ids != found.category_ids[at]] = np.inf
            near = int(far.argmin())
            np.testing.assert_allclose(other.boxes[near], turned, atol=0.3)
            assert found.scores[at] == pytest.approx(other.scores[near], abs=5e-3)
            assert found.box_std is not None
            assert other.box_std is not None
            np.testing.assert_allclose(
                found.box_std[at], other.box_std[near][[2, 1, 0, 3]], atol=0.2
            )
            assert found.anchor is not None
            assert other.anchor is not None
            assert found.anchor[at] == other.anchor[near]
            boxes += 1
    assert boxes > 50


def test_a_view_finds_the_objects_where_they_are(pages: Path, runs: dict[str, Manifest]) -> None:
    truth = str(pages / "truth.json")
    found = {name: evaluate_run(runs[name], truth).map_ or 0 for name in ("usual", "small")}
    assert found["usual"] > 0.5
    # Digits are no mirror images of each other, so a mirrored page is read worse, but no box is
    # misplaced: boxes turned wrongly would leave next to nothing.
    assert found["small"] > 0.1


def test_it_is_recorded_and_a_run_is_of_one_view(pages: Path, runs: dict[str, Manifest]) -> None:
    recorded = json.loads(runs["small"].store.get(RUN_KEY))
    assert recorded["inference"]["view"] == {"flip": True, "scale": 0.75}
    assert "mirrored, at 0.75 of the usual size (model.view)" in recorded["remarks"][-1]
    assert "view" not in json.loads(runs["usual"].store.get(RUN_KEY))["inference"]
    again = labelled(config_of(pages, "plain", "flip", view={"flip": True}))
    assert again.record.identity == runs["flip"].record.identity
    with pytest.raises(RunMismatch, match="view"):
        open_run(config_of(pages, "plain", "flip"), cuda=False)
    assert verify_run(Manifest.open(runs["small"].url)).exit_code == 0


def test_views_are_compared_fused_and_fitted(pages: Path, runs: dict[str, Manifest]) -> None:
    images = len(list(live_rows(runs["usual"])))
    compared = compare_runs(runs["usual"], runs["flip"], pictures=0)
    assert compared.changes.images == images
    output = open_store(str(pages / "fused"))
    done = fuse_runs([runs["usual"], runs["flip"]], output)
    assert (done.images, done.waiting, done.alone) == (images, 0, {})
    fused = Manifest.open(output.url)
    stated = json.loads(output.get(RUN_KEY))["inference"]["fusion"]["runs"]
    assert [run.get("view") for run in stated] == [None, {"flip": True, "scale": 1.0}]
    votes = [row.detections.agreement for row in live_rows(fused) if len(row.detections)]
    agreed = np.concatenate([one for one in votes if one is not None])
    assert agreed.max() > 0.5
    assert agreed.min() == 0
    truth = read_truth(str(pages / "truth.json"))
    fitted = fit_run(fused, truth)
    assert fitted.policy.calibration is not None
    assert fitted.boxes > 50


def test_a_view_that_changes_nothing_is_refused_and_plan_says_what_is_seen(pages: Path) -> None:
    with pytest.raises(ConfigError, match="changes nothing"):
        config_of(pages, "plain", "x", view={})
    with pytest.raises(ConfigError, match="scale"):
        config_of(pages, "plain", "x", view={"scale": 3})
    planned = plan_run(config_of(pages, "plain", "x", view={"scale": 0.5}))
    assert "at 0.5 of the usual size" in planned.model_remarks[-1]

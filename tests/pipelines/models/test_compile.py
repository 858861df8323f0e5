"""The artefact is made once, of images that nothing is measured on, and refused when it loses."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.run_config import RunConfig
from pipelines.ingest.ingest import ingest
from pipelines.labelling.open_run import open_run
from pipelines.models.artefact import with_artefact
from pipelines.models.compile import compile_model
from pipelines.models.int8 import Against
from pipelines.models.measure import (
    SURE,
    expected_from_detections,
    expected_from_truth,
    mean_ap,
    refuse_unmeasured,
)
from pipelines.models.sample_images import measured, sample, unseen
from storage.coco.truth import read_truth
from storage.errors import ArtefactError, SourceEmpty, StorageFull, TruthMismatch
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from tests.support.samples.tiny_run import fill_folder, run_config
from workers.compile.make_artefact import artefact_key
from workers.compile.quantize import GROUPS, RECIPE, Verdict, search
from workers.images.preprocessing import Preprocessing
from workers.runtimes.artefacts import Artefact
from workers.spec import ArtefactRef, ModelSpec

Make = Callable[..., RunConfig]
SMALL = Preprocessing(size=(64, 64), resize_to=(64, 64))
SPEC = ModelSpec(
    checkpoint="", sha256="a" * 64, name="yolo_nas_s", arch_params=None, classes=("a", "b"),
    keep=(0, 1), preprocessing=SMALL, runtime="openvino", precision="fp32", device="cpu",
    score_floor=0.05, nms_iou=0.7, max_detections=300,
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, nano_checkpoint: Path) -> Make:
    """Configs of 20 images in a folder; sections are merged in."""
    fill_folder(tmp_path / "in", 20)

    def make(**sections: Any) -> RunConfig:
        source = sections.pop("folder", tmp_path / "in")
        return run_config(source, tmp_path / "out", nano_checkpoint, **sections)

    return make


def truth_file(path: Path, names: Sequence[str], box: Sequence[float] = (8, 8, 20, 30)) -> Path:
    images = [{"id": i, "file_name": n, "width": 64, "height": 64} for i, n in enumerate(names)]
    boxes = [{"id": i + 1, "image_id": i, "category_id": 7, "bbox": list(box), "area": 600}
             for i in range(len(names))]  # fmt: skip
    categories = [{"id": 7, "name": "b"}]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return path


# -- which images


@pytest.mark.parametrize("tars", [False, True])
def test_what_is_measured_on_is_never_calibrated_on(
    config: Make, tmp_path: Path, tars: bool
) -> None:
    if tars:
        ingest(str(tmp_path / "in"), str(tmp_path / "tars"), options=StorageOptions(),
               images_per_shard=6)  # fmt: skip
    made = config(folder=tmp_path / ("tars" if tars else "in"))
    names = [f"page-{i:04d}.png" for i in range(3, 12)]
    truth = read_truth(truth_file(tmp_path / "truth.json", names))
    calibration = sample(made, SMALL, 100, truth)
    inputs, indices = measured(made, SMALL, truth)
    assert len(calibration) == 11
    assert calibration.pixels.shape == (11, 64, 64, 3)
    ends = [i.rsplit("/", 1)[-1] for i in (*calibration.image_ids, *inputs.image_ids)]
    assert sorted(ends) == [f"page-{i:04d}.png" for i in range(20)]
    assert [names[i] for i in indices] == ends[11:]
    again = sample(made, SMALL, 100, truth)
    assert again.image_ids == calibration.image_ids
    assert again.sha256 == calibration.sha256


def test_a_sample_is_as_many_as_asked_for(config: Make) -> None:
    found = sample(config(), SMALL, 7)
    assert len(set(found.image_ids)) == 7
    assert (found.pixels.reshape(7, -1).std(1) > 0).all()
    assert len(found.part(2, 5)) == 3


def test_a_sample_takes_its_room_on_the_disk_first(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a mapped file runs out of disk, SIGBUS ends the process without a word."""
    taken = []

    def full_after_three(file: int, offset: int, nbytes: int) -> None:
        if len(taken) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken.append((offset, nbytes))

    monkeypatch.setattr(os, "posix_fallocate", full_after_three)
    with pytest.raises(StorageFull, match="no space left for images in "):
        sample(config(), SMALL, 7)
    each = 3 * SMALL.size[0] * SMALL.size[1]
    assert taken == [(0, each), (each, each), (2 * each, each)]


def test_truth_of_every_image_or_of_another_source(config: Make, tmp_path: Path) -> None:
    names = [f"page-{i:04d}.png" for i in range(20)]
    with pytest.raises(SourceEmpty, match="ground truth names all of them"):
        sample(config(), SMALL, 8, read_truth(truth_file(tmp_path / "all.json", names)))
    with pytest.raises(TruthMismatch, match="have no row"):
        measured(config(), SMALL, read_truth(truth_file(tmp_path / "no.json", ["other.png"])))


@pytest.mark.parametrize("prefix", ["", "shard-0.tar/"])
def test_what_a_model_was_calibrated_on_is_left_out_of_what_it_is_measured_on(
    tmp_path: Path, prefix: str
) -> None:
    names = [f"page-{i:04d}.png" for i in range(6)]
    truth = read_truth(truth_file(tmp_path / "truth.json", names))
    calibrated = [f"{prefix}{name}" for name in (names[1], names[4], "page-0099.png")]
    left = unseen(truth, calibrated)
    assert [i.name for i in left.images] == [names[i] for i in (0, 2, 3, 5)]
    assert left.boxes == tuple(truth.boxes[i] for i in (0, 2, 3, 5))
    assert unseen(truth, []) == truth
    assert unseen(truth, names).images == ()


# -- what is lost


def found(boxes: Sequence[Sequence[float]], scores: Sequence[float], label: int) -> Detections:
    empty = Detections.empty(2)
    n = len(boxes)
    return dataclasses.replace(
        empty,
        boxes=np.array(boxes, np.float32).reshape(n, 4),
        scores=np.array(scores, np.float32),
        category_ids=np.full(n, label, np.int16),
    )


def test_map_against_truth(tmp_path: Path) -> None:
    truth = read_truth(truth_file(tmp_path / "truth.json", ["a.png", "b.png"]))
    expected = expected_from_truth(truth, (0, 1), ("a", "b"))
    right = found([[8, 8, 28, 38]], [0.9], 1)
    assert mean_ap([right, right], expected) == pytest.approx(100)
    assert mean_ap([right, found([[40, 40, 60, 60]], [0.8], 1)], expected) < 60
    assert mean_ap([found([[8, 8, 28, 38]], [0.9], 0)] * 2, expected) == 0
    with pytest.raises(TruthMismatch, match="share no class"):
        expected_from_truth(truth, (0, 1), ("x", "y"))


def test_agreement_counts_what_fp32_is_sure_of() -> None:
    sure = found([[8, 8, 28, 38], [30, 30, 50, 60]], [0.9, SURE - 0.1], 1)
    expected = expected_from_detections([sure], 2)
    assert mean_ap([sure], expected) == pytest.approx(100)
    assert mean_ap([found([[8, 8, 28, 38]], [0.7], 1)], expected) == pytest.approx(100)
    assert mean_ap([found([[30, 30, 50, 60]], [0.7], 1)], expected) == 0


@pytest.mark.parametrize("against", ["fp32", "truth.json"])
def test_where_fp32_finds_nothing_no_loss_is_called_small(against: str) -> None:
    unsure = found([[8, 8, 28, 38]], [SURE - 0.1], 1)
    expected = expected_from_detections([unsure], 2)
    fp32 = mean_ap([unsure], expected)
    with pytest.raises(ArtefactError, match="cannot be measured: on 5 images fp32 itself"):
        refuse_unmeasured(fp32, 5, against, 0.5)
    refuse_unmeasured(fp32, 5, against, 100)
    refuse_unmeasured(80.0, 5, against, 0.5)


class Blocks:
    """A quantiser whose blocks cost what they are said to cost."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs, self.compared = costs, 0

    def quantise(self, kept: Sequence[str], *, few: bool = False) -> Artefact:
        self.compared += few
        lost = sum(cost for name, cost in self.costs.items() if name not in kept)
        return Artefact({}, "model.xml", {"lost": lost})


@dataclasses.dataclass
class SaidLoss:
    """A judge that believes what ``Blocks`` says, to ``half`` points either way."""

    limit: float
    half: float = 0.05

    def loss(self, artefact: Artefact) -> float:
        return float(artefact.facts["lost"])

    def verdict(self, artefact: Artefact) -> Verdict:
        lost = self.loss(artefact)
        high = lost + self.half
        return Verdict(lost, lost - self.half, high, 1.0, 1.0, passed=high <= self.limit)


def searched(costs: dict[str, float], limit: float, half: float = 0.05) -> Any:
    blocks: Any = Blocks(costs)
    return search(blocks, SaidLoss(limit, half), limit, lambda _: None), blocks


def test_the_recipe_alone_where_it_is_enough() -> None:
    chosen, blocks = searched({"backbone.stem": 0.2, **dict.fromkeys(RECIPE, 9.0)}, 0.5)
    assert chosen.kept == RECIPE
    assert blocks.compared == 0
    assert chosen.verdict.loss == pytest.approx(0.2)


def test_the_blocks_that_hurt_most_stay_in_float32() -> None:
    costs = {"backbone.stage1": 2.0, "neck.neck2": 3.0, "neck.neck4": 0.3}
    chosen, blocks = searched(costs, 0.5)
    others = len(GROUPS) - len(RECIPE)
    assert blocks.compared == others + others - 1
    assert chosen.kept == (*RECIPE, "neck.neck2", "backbone.stage1")
    assert [t.loss for t in chosen.trials] == [5.3, 2.3, 0.3]


def test_a_block_that_only_hurts_once_another_does_not_is_found() -> None:
    class Masked(Blocks):
        def quantise(self, kept: Sequence[str], *, few: bool = False) -> Artefact:
            if "backbone.stage1" not in kept:
                return Artefact({}, "model.xml", {"lost": 5.0 + ("backbone.stem" in kept)})
            return super().quantise(kept, few=few)

    blocks: Any = Masked({"backbone.stem": 0.9})
    chosen = search(blocks, SaidLoss(0.5), 0.5, lambda _: None)
    assert chosen.kept == (*RECIPE, "backbone.stage1", "backbone.stem")


def test_a_model_that_loses_too_much_is_not_shipped() -> None:
    with pytest.raises(ArtefactError, match=r"more than the 0\.5 that model\.max_loss allows"):
        searched(dict.fromkeys(GROUPS, 2.0), 0.5)


def test_a_small_loss_that_may_be_large_is_not_enough() -> None:
    """0.2 points lost, give or take 1: blocks go back to float32, and then it is refused."""
    with pytest.raises(ArtefactError, match=r"up to 1\.00 with 95 % confidence") as refused:
        searched({"backbone.stem": 0.2}, 0.5, half=1.0)
    assert "measure on more images" in str(refused.value.hint)


# -- the key, and the run


def test_a_key_names_what_makes_the_graph_another_one() -> None:
    key = artefact_key(SPEC)
    assert artefact_key(dataclasses.replace(SPEC, score_floor=0.3, licence="x")) == key
    assert artefact_key(dataclasses.replace(SPEC, precision="bf16")) == key
    others = [
        dataclasses.replace(SPEC, sha256="b" * 64),
        dataclasses.replace(SPEC, keep=(1,)),
        dataclasses.replace(SPEC, runtime="onnx"),
        dataclasses.replace(SPEC, precision="int8"),
        dataclasses.replace(SPEC, preprocessing=dataclasses.replace(SMALL, channels="BGR")),
    ]
    assert len({key, *map(artefact_key, others)}) == 1 + len(others)


def test_torch_needs_no_artefact(config: Make) -> None:
    spec = dataclasses.replace(SPEC, runtime="torch")
    assert with_artefact(config(), spec).artefact is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_int8_from_config_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano_checkpoint: Path
) -> None:
    """Real NNCF on drawn pages: compiled once, measured, and what the run then loads.

    The recipe is enough. (Run as one model with its decoding, OpenVINO lost 33 points here.)
    """
    from pipelines.demo.digits import make_pages

    loaded_before = "openvino_telemetry" in sys.modules  # by a test that imported OpenVINO itself
    monkeypatch.setenv("LABELFLEET_CACHE", str(tmp_path / "cache"))
    # Two blocks to try, of fourteen: each costs seconds.
    tried = (*RECIPE, "backbone.stage1", "neck.neck1")
    monkeypatch.setattr("workers.compile.quantize.GROUPS", {name: GROUPS[name] for name in tried})
    pages = make_pages(tmp_path / "pages", images=28, seed=9, split="unseen", broken=False)
    labelled = json.loads(pages.truth.read_text())
    labelled["images"] = labelled["images"][:10]
    ids = {image["id"] for image in labelled["images"]}
    labelled["annotations"] = [a for a in labelled["annotations"] if a["image_id"] in ids]
    (tmp_path / "truth.json").write_text(json.dumps(labelled))
    truth = read_truth(tmp_path / "truth.json")

    def make(**model: Any) -> RunConfig:
        section = {"runtime": "openvino", "precision": "int8", "max_loss": 5, **model}
        return run_config(pages.images, tmp_path / "out", nano_checkpoint, model=section)

    first = compile_model(make(), cuda=False, against=Against(truth))
    assert first.new
    if not loaded_before:  # neither OpenVINO nor NNCF reports to its makers
        assert sys.modules["openvino_telemetry"] is None
    facts = first.facts
    assert facts["calibration"]["images"] == len(list(pages.images.iterdir())) - 10
    assert len(facts["calibration"]["image_ids"]) == facts["calibration"]["images"]
    assert not {i["file_name"] for i in labelled["images"]} & set(facts["calibration"]["image_ids"])
    assert facts["measured"]["images"] == 10
    assert facts["measured"]["fp32_map"] > 50
    assert facts["measured"]["loss"] <= facts["measured"]["loss_interval"][1] <= 5
    assert facts["measured"]["agreement_low"] >= 0.9
    assert facts["kept"] == list(RECIPE)
    assert set(facts["versions"]) == {"torch", "onnx", "openvino", "nncf"}
    again = compile_model(make(), cuda=False, against=Against(truth))
    assert not again.new
    assert again.checked is not None
    assert again.checked["int8_map"] == pytest.approx(facts["measured"]["int8_map"], abs=0.5)
    run = open_run(make(), cuda=False)
    assert run.model.artefact == ArtefactRef(str(first.artefact), str(first.sha256))
    assert open_run(make(), cuda=False).model == run.model

"""labelfleet train, whole: what it leaves, that it continues, and that it can be used at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from rich.console import Console

from pipelines.demo.digits import make_pages
from pipelines.dispatch.stopping import Stopper
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import ClassThresholds, Policy
from pipelines.training.config import TrainConfig
from pipelines.training.summary import training_table
from pipelines.training.team.listeners import listening
from storage.errors import CheckpointError, ConfigError, Interrupted, RunLocked, SourceError
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_store
from tests.support.patience import patient
from tests.support.samples.label_version import CALIBRATED, labelled
from tests.support.samples.training_samples import box, write_coco
from workers.checkpoints.cache import file_sha256
from workers.spec import ModelRequest

pytestmark = pytest.mark.slow  # super-gradients takes seconds to import

ASSETS = Path(__file__).resolve().parents[3] / "pipelines" / "assets"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight training pages and four to validate on, as config sections."""
    folder = tmp_path_factory.mktemp("pages")
    sections = {}
    for part, split, images in (("train", "train", 8), ("val", "val", 4)):
        made = make_pages(folder / part, images=images, split=split, broken=False)  # type: ignore[arg-type]
        sections[part] = {"annotations": str(made.truth), "images": str(made.images)}
    return sections


@pytest.fixture
def config(pages: dict[str, Any], tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**more: Any) -> TrainConfig:
        fields = {
            "name": "tiny",
            "output": str(tmp_path / "model"),
            **pages,
            "test": {"again": pages["val"]},
            "model": {"arch": str(ASSETS / "digits_nano_arch.yaml"), "licence": "Apache-2.0"},
            "image_size": 96,
            "batch_size": 2,
            "steps": 4,
            "eval_every": 2,
            "precision": "fp32",
            "threads": 1,
            **more,
        }
        return TrainConfig.model_validate(fields)

    return make


def test_it_leaves_a_checkpoint_that_says_everything_about_itself(
    config: Callable[..., TrainConfig],
) -> None:
    from pipelines.training.run import train
    from workers.checkpoints.file import read_checkpoint
    from workers.models.load_torch import load_detector
    from workers.models.resolve import resolve_model

    summary = train(config())
    checkpoint = read_checkpoint(Path(summary.checkpoint))
    assert checkpoint.sha256 == summary.sha256
    assert checkpoint.classes == tuple("0123456789")
    assert checkpoint.image_size == (96, 96)
    assert checkpoint.licence == "Apache-2.0"
    assert (checkpoint.training or {})["config"]["steps"] == 4
    assert summary.nbytes < 5_000_000
    assert summary.parameters < 2_000_000
    assert [step for step, _, _ in summary.history] == [2, 4]
    assert summary.test["again"].images == 4
    # A labelling run needs nothing but its path.
    spec = resolve_model(
        ModelRequest(checkpoint=summary.checkpoint), StorageOptions(), device="cpu"
    )
    assert load_detector(spec, StorageOptions(), threads=1).preprocessing.resize_to == (92, 92)


def test_the_same_call_again_trains_nothing_and_another_config_is_refused(
    config: Callable[..., TrainConfig],
) -> None:
    from pipelines.training.run import train

    first = train(config())
    written = Path(first.checkpoint).stat().st_mtime_ns
    assert train(config()) == first
    assert Path(first.checkpoint).stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="another config"):
        train(config(lr=0.5))


def test_a_second_training_into_the_same_output_is_told_who_holds_it(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.training.run import train
    from pipelines.training.view import TrainView

    shown, refused = TrainView.step, []

    def step(self: TrainView, report: Any) -> None:
        shown(self, report)
        if not refused:
            with pytest.raises(RunLocked) as caught:
                train(config(seed=1))
            refused.append(caught.value)

    monkeypatch.setattr(TrainView, "step", step)
    summary = train(config())
    [error] = refused
    assert error.exit_code == 75
    assert "the output is held by `labelfleet train " in error.message
    assert "status" not in (error.hint or "")  # which is of runs
    assert file_sha256(Path(summary.checkpoint)) == summary.sha256
    assert not (config().output / "lock.json").exists()
    assert train(config()) == summary


def test_a_stop_request_ends_after_the_step_and_the_same_call_continues(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.training.run import train
    from pipelines.training.view import TrainView

    steps: list[int] = []
    shown = TrainView.step

    def step(self: TrainView, report: Any) -> None:
        shown(self, report)
        steps.append(report.step)
        if steps == [1, 2, 3]:
            stopper.request()

    monkeypatch.setattr(TrainView, "step", step)
    stopper = Stopper()
    with pytest.raises(Interrupted, match="step 3 of 4"):
        train(config(), stopper=stopper)
    summary = train(config())
    assert steps == [1, 2, 3, 4]
    assert summary.steps == 4
    state = config().output / "state.pt"
    assert not state.exists()


def test_a_finished_training_is_extended_and_a_stopped_extension_continues(
    config: Callable[..., TrainConfig],
) -> None:
    from pipelines.training.extend import Extension, extend
    from pipelines.training.run import train, train_part

    quiet: Any = {"console": None, "stopper": Stopper(), "accept_data": False}
    with pytest.raises(ConfigError, match="no finished training"):
        train(config(), more_steps=3)
    first = train(config())
    output = config().output
    assert extend(output, first, Extension(3, "cut off"))
    shutil.copy(output / "summary_4_steps.json", output / "summary.json")  # an upload cut off
    assert extend(output, first, Extension(3, "cut off")), "it was begun, and not carried out"
    stopper = Stopper()
    stopper.request()
    with pytest.raises(Interrupted, match="step 5 of 7"):
        train(config(), stopper=stopper, more_steps=3)
    with pytest.raises(ConfigError, match="from step 4 to step 7, and is at step 5"):
        train(config(), more_steps=2)
    longer = train(config(), more_steps=3)
    assert (first.steps, longer.steps, longer.extended_at) == (4, 7, 4)
    assert [step for step, _, _ in longer.history] == [2, 4, 6, 7]
    assert longer.history[:2] == first.history
    assert longer.best_step >= first.best_step
    assert longer.val.map_ >= first.val.map_
    assert train(config()) == longer
    assert train_part(config(), more=Extension(3, "other"), **quiet).steps == 10
    again = train_part(config(), more=Extension(3, "other"), **quiet)
    assert again.steps == 10, "a worker that is started again extends nothing twice"
    names = {path.name for path in config().output.iterdir()}
    assert {"summary.json", "summary_4_steps.json", "last_state.pt"} <= names
    assert "state.pt" not in names
    (config().output / "last_state.pt").unlink()
    with pytest.raises(ConfigError, match="no state of step 10"):
        train(config(), more_steps=1)


def test_training_starts_from_a_checkpoint_of_another_number_of_classes(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from pipelines.training.run import train
    from pipelines.training.start import first_network
    from workers.checkpoints.file import read_checkpoint

    ten = train(config())
    path = write_coco(tmp_path / "rings", [(90, 60)] * 2, [box(1, 7, 5, 5, 30, 30)])
    data = {"annotations": str(path), "images": str(path.parent)}
    model = {"checkpoint": ten.checkpoint}
    other = config(model=model, train=data, val=data, test={}, output=str(tmp_path / "second"))
    network, weights = first_network(other, ("ring", "bar", "blur")), read_checkpoint(
        Path(ten.checkpoint)
    ).load_state_dict()  # fmt: skip
    state = network.state_dict()
    stem = "backbone.stem.conv.branch_3x3.conv.weight"
    assert (state[stem] == weights[stem].float()).all()
    assert state["heads.head1.cls_pred.weight"].shape[0] == 3
    three = train(other)
    assert three.classes == ("ring", "bar", "blur")
    assert read_checkpoint(Path(three.checkpoint)).official_ids == (7, 3, 90)  # as in the truth
    plain = tmp_path / "arch.yaml"
    arch = yaml.safe_load((ASSETS / "digits_nano_arch.yaml").read_text())
    arch["backbone"]["NStageBackbone"]["stem"]["YoloNASStem"]["out_channels"] = 24
    plain.write_text(yaml.safe_dump(arch))
    with pytest.raises(CheckpointError, match="does not fit"):
        first_network(config(model={**model, "arch": str(plain)}), ("a", "b", "c"))


def test_val_with_other_classes_is_refused(
    config: Callable[..., TrainConfig], pages: dict[str, Any], tmp_path: Path
) -> None:
    from pipelines.training.run import train

    truth = json.loads(Path(pages["val"]["annotations"]).read_text())
    truth["categories"].reverse()
    path = tmp_path / "reversed.json"
    path.write_text(json.dumps(truth))
    val = {**pages["val"], "annotations": str(path)}
    with pytest.raises(ConfigError, match="same order"):
        train(config(val=val))


def _jpeg_pages(folder: Path, images: int = 8) -> dict[str, str]:
    """Drawn pages as a section; page 3 is a truncated JPEG under its old name."""
    from PIL import Image

    made = make_pages(folder, images=images, split="train", broken=False)
    names = sorted(p.name for p in made.images.iterdir())
    with Image.open(made.images / names[3]) as page:
        page.convert("RGB").save(folder / "page.jpg", "JPEG", quality=95)
    whole = (folder / "page.jpg").read_bytes()
    (made.images / names[3]).write_bytes(whole[: len(whole) // 2])
    return {"annotations": str(made.truth), "images": str(made.images)}


def test_a_truncated_image_is_left_out_and_the_training_ends(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from pipelines.training.run import train

    bad = _jpeg_pages(tmp_path / "bad")
    with pytest.raises(SourceError, match="1 of 8 images cannot be used"):
        train(config(train=bad))
    summary = train(config(train=bad, max_bad_share=0.2))
    assert summary.steps == 4
    assert summary.images == 7
    assert [list(faults) for faults in summary.left_out.values()] == [
        [sorted(p.name for p in Path(bad["images"]).iterdir())[3]]
    ]
    written = json.loads((tmp_path / "model/summary.json").read_text())
    assert written["left_out"] == summary.left_out


def test_changed_data_is_said_and_can_be_accepted(
    config: Callable[..., TrainConfig], pages: dict[str, Any], tmp_path: Path
) -> None:
    from pipelines.training.run import train

    truth = json.loads(Path(pages["train"]["annotations"]).read_text())
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(truth))
    section = {"annotations": str(mine), "images": pages["train"]["images"]}
    stopper = Stopper()
    stopper.request()
    with pytest.raises(Interrupted):
        train(config(train=section), stopper=stopper)
    gone = truth["images"].pop()["id"]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] != gone]
    mine.write_text(json.dumps(truth))
    with pytest.raises(ConfigError, match="annotations or images changed") as refused:
        train(config(train=section))
    assert "--accept-data" in str(refused.value.hint)
    with pytest.raises(ConfigError, match="another config"):
        train(config(train=section, lr=0.5), accept_data=True)
    summary = train(config(train=section), accept_data=True)
    assert (summary.steps, summary.images) == (4, 7)


def test_the_commands_stdout_holds_the_summary_alone(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """In a fresh process: whatever super-gradients prints when it is imported would stand there."""
    fields = config(steps=1, eval_every=1, test={}).model_dump(mode="json")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(fields))
    done = subprocess.run(
        [sys.executable, "-c", "from pipelines.cli.main import main; main()", "train",
         str(tmp_path / "train.yaml"), "--json"],
        capture_output=True, text=True, timeout=patient(280), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["steps"] == 1


def test_a_label_version_is_trained_on_and_the_checkpoint_labels(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """From a run's output to a student that the next run loads by its path alone."""
    from pipelines.training.run import train
    from workers.checkpoints.file import read_checkpoint
    from workers.models.load_torch import load_detector
    from workers.models.resolve import resolve_model

    faint = {"bright": ClassThresholds.model_validate({"known": 0.1})}
    policy = CALIBRATED.model_copy(update={"classes": faint})
    run = labelled(open_store(str(tmp_path / "photos")), open_store(str(tmp_path / "run")), policy)
    categories = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
    boxes = [box(1, 1, 4, 4, 20, 20), box(2, 2, 4, 4, 20, 20)]
    path = write_coco(tmp_path / "val", [(40, 40)] * 2, boxes, categories=categories)
    val = {"annotations": str(path), "images": str(path.parent)}
    sources = [{"labels": run.url, "share": 0.5}, {**val, "share": 0.5}]
    made = config(
        train=sources, val=val, test={}, steps=2, cache={"dir": str(tmp_path / "c"), "size": "1MB"}
    )
    summary = train(made)
    assert (summary.images, summary.steps) == (12, 2)
    said = (read_checkpoint(Path(summary.checkpoint)).training or {})["sources"]
    assert [one["images"] for one in said] == [10, 2]
    assert said[0]["version"] == "v0001"
    (silent,) = summary.silent.values()
    assert silent.keys() == said[0]["silent"].keys() == {"bright"}
    console = Console(width=400)
    with console.capture() as shown:
        console.print(training_table(summary))
    assert "images that people did not settle are silent about bright: labels and" in shown.get()
    assert said[0]["model_sha256"] == run.record.identity.model_sha256
    spec = resolve_model(
        ModelRequest(checkpoint=summary.checkpoint), StorageOptions(), device="cpu"
    )
    assert spec.classes == ("dark", "bright")
    detector = load_detector(spec, StorageOptions(), threads=1)
    assert len(detector.detect(np.zeros((1, 96, 96, 3), np.uint8))) == 1
    assert train(made) == summary, "finished: nothing is trained again"
    decide_run(run, Policy(accept=0.3, reject=0.1))
    with pytest.raises(ConfigError, match="another output"):
        train(made)


def test_stages_train_one_after_the_other_and_continue_where_they_stopped(
    config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.training import run
    from pipelines.training.start import first_network
    from pipelines.training.view import TrainView
    from workers.checkpoints.file import read_checkpoint

    seen: list[int] = []
    shown = TrainView.step

    def step(self: TrainView, report: Any) -> None:
        shown(self, report)
        seen.append(report.step)
        if len(seen) == 3:
            stopper.request()

    monkeypatch.setattr(TrainView, "step", step)

    class Heard:
        steps: ClassVar[list[int]] = []
        validations: ClassVar[list[int]] = []

        def step(self, report: Any) -> None:
            self.steps.append(report.step)

        def validated(self, step: int, scores: Any) -> None:
            self.validations.append(step)

        def close(self) -> None:
            pass

    stages = [
        {"name": "pretrain", "steps": 2, "augment": {"mosaic": 1.0}},
        {"name": "finetune", "steps": 3, "lr": 0.0001, "freeze": "backbone"},
    ]
    staged = config(stages=stages, test={}, eval_every=9)
    stopper = Stopper()
    with listening([Heard()]), pytest.raises(Interrupted, match="step 1 of 3"):
        run.train(staged, stopper=stopper)
    pretrained = tmp_path / "model/stages/pretrain/tiny.safetensors"
    written = pretrained.stat().st_mtime_ns
    with listening([Heard()]):
        summary = run.train(staged)
    assert seen == [1, 2, 1, 2, 3]
    assert (Heard.steps, Heard.validations) == ([1, 2, 3, 4, 5], [2, 5])
    assert pretrained.stat().st_mtime_ns == written
    (record,) = summary.stages
    before, after = read_checkpoint(pretrained), read_checkpoint(Path(summary.checkpoint))
    assert (record["name"], record["steps"]) == ("pretrain", 2)
    assert record["sha256"] == before.sha256
    assert (after.training or {})["stages"] == [record]
    assert (after.training or {})["config"]["lr"] == 0.0001
    # The frozen backbone is that of the first stage, not of the first random weights.
    stem = "backbone.stem.conv.branch_3x3.conv.weight"
    kept = after.load_state_dict()[stem]
    assert (kept == before.load_state_dict()[stem]).all()
    assert not (kept == first_network(staged, tuple("0123456789")).state_dict()[stem]).all()
    assert run.train(staged) == summary
    with pytest.raises(ConfigError, match="another config"):
        run.train(config(stages=[{**stages[0], "lr": 0.5}, stages[1]], test={}))


def test_a_checkpoint_of_a_later_stage_names_no_folder_that_is_gone(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from pipelines.training.run import train
    from workers.checkpoints.file import read_checkpoint

    stages = [{"name": "pretrain", "steps": 1}, {"name": "finetune", "steps": 1}]
    url = "memory://stages/models/cells"
    asked = config(output=url, stages=stages, test={})
    summary = train(asked)
    assert summary.checkpoint == f"{url}/tiny.safetensors"
    kept = open_store(url, StorageOptions()).get("tiny.safetensors")
    (tmp_path / "kept.safetensors").write_bytes(kept)
    found = read_checkpoint(tmp_path / "kept.safetensors")
    first = f"{url}/stages/pretrain/tiny.safetensors"
    (parent,) = (found.provenance or {})["ancestors"]
    assert (parent["role"], parent["checkpoint"]) == ("first weights", first)
    assert parent["sha256"] == summary.stages[0]["sha256"]
    assert (found.training or {})["config"]["model"]["checkpoint"] == first
    assert train(asked) == summary


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"precision": "fp16", "device": "cpu"}, "fp16 needs CUDA"),
        ({"channels_last": True, "device": "cpu"}, "channels_last: true needs CUDA"),
    ],
)
def test_what_needs_cuda_is_refused_before_anything_is_read(
    config: Callable[..., TrainConfig], more: dict[str, Any], message: str
) -> None:
    from pipelines.training.run import train

    with pytest.raises(ConfigError, match=message):
        train(config(**more))
    assert not config().output.exists()

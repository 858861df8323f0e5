"""`distill` in a training's config: what it does to the fingerprint, the file and the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines.demo.digits import make_pages
from pipelines.training.config import TrainConfig
from storage.errors import CheckpointError, ConfigError
from storage.stores.open import open_store
from tests.support.samples.label_version import labelled
from tests.support.samples.training_samples import box, write_coco
from workers.images.preprocessing import Preprocessing

ARCH = Path(__file__).resolve().parents[3] / "pipelines" / "assets" / "digits_nano_arch.yaml"
DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = make_pages(tmp_path_factory.mktemp("pages"), images=4, split="train", broken=False)
    return {"annotations": str(made.truth), "images": str(made.images)}


@pytest.fixture
def config(pages: dict[str, str], tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**more: Any) -> TrainConfig:
        fields = {
            "name": "student", "output": str(tmp_path / "model"), "train": pages, "val": pages,
            "model": {"arch": str(ARCH), "licence": "MIT"}, "image_size": 64, "batch_size": 2,
            "steps": 6, "eval_every": 6, "precision": "fp32", "threads": 1, **more,
        }  # fmt: skip
        return TrainConfig.model_validate(fields)

    return make


def teacher_file(path: Path, seed: int = 7, classes: tuple[str, ...] = DIGITS) -> Path:
    from workers.checkpoints.description import Description
    from workers.checkpoints.file import save_checkpoint
    from workers.yolo_nas.network import build_network

    torch.manual_seed(seed)
    text = json.dumps(yaml.safe_load(ARCH.read_text()))
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(
        path,
        build_network("yolo_nas_s", text, len(classes)).state_dict(),
        Description(
            name="yolo_nas_s",
            arch_params=text,
            classes=classes,
            licence="DECI-NC",
            training={},
            preprocessing=Preprocessing(size=(64, 64), resize_to=(60, 60)),
        ),
    )
    return path


def with_nan(good: Path, path: Path) -> Path:
    """A copy whose first weight is not a number."""
    with safe_open(good, framework="pt") as file:
        said = file.metadata()
    state = load_file(good)
    next(value for value in state.values() if value.is_floating_point()).view(-1)[0] = float("nan")
    save_file(state, path, metadata=said)
    return path


def taught(path: Path, **more: Any) -> dict[str, Any]:
    return {"distill": {"mode": "teacher", "teacher": str(path), **more}}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"mode": "teacher"}, "needs `teacher`"),
        ({"mode": "stored", "teacher": "x.pth"}, "leave `teacher` out"),
        ({"mode": "stored", "weight": -1}, "greater than or equal to 0"),
        ({"mode": "stored", "weight": float("nan")}, "finite"),
        ({"mode": "both"}, "stored"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused(
    config: Callable[..., TrainConfig], section: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        config(distill=section)


def test_the_teachers_bytes_count_and_its_place_does_not(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{name}.pth" for name in "abc"]
    for path, content in zip(paths, (b"one", b"one", b"two"), strict=True):
        path.write_bytes(content)
    a, b, c = (config(**taught(path)).fingerprint() for path in paths)
    assert a == b != c
    assert config().fingerprint() not in (a, c)
    assert config(**taught(paths[0], weight=2.0)).fingerprint() != a


def test_a_config_without_distill_has_the_fingerprint_it_had() -> None:
    part = {"annotations": "data/train.json", "images": "data/images"}
    fields = {"name": "cells", "output": "runs/cells", "train": part, "val": part, "steps": 10}
    made = TrainConfig.model_validate(fields)
    assert made.fingerprint(data=False) == "4326a0e032a9d1a8"  # computed before there was `distill`


def test_stored_knowledge_needs_a_label_version(config: Callable[..., TrainConfig]) -> None:
    from pipelines.training.run import train

    made = config(distill={"mode": "stored"})
    with pytest.raises(ConfigError, match="no source in `train` is a label version"):
        train(made)
    assert not (made.output / "state.pt").exists()


def test_a_teacher_of_other_classes_is_refused_before_the_first_step(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from pipelines.training.run import train

    made = config(**taught(teacher_file(tmp_path / "t.safetensors", classes=("cat", "dog"))))
    with pytest.raises(ConfigError, match=r"the teacher t.safetensors knows .*cat, dog"):
        train(made)


@pytest.mark.parametrize("staged", [False, True])
def test_a_teacher_of_nan_weights_is_one_line_before_anything_is_trained(
    config: Callable[..., TrainConfig], tmp_path: Path, staged: bool
) -> None:
    from pipelines.training.run import train

    bad = taught(with_nan(teacher_file(tmp_path / "t.safetensors"), tmp_path / "bad.safetensors"))
    second = {"stages": [{"name": "first", "steps": 1}, {"name": "second", "steps": 1, **bad}]}
    made = config(**(second if staged else bad))
    with pytest.raises(CheckpointError) as refused:
        train(made)
    assert refused.value.message.startswith("bad.safetensors: ")
    assert refused.value.message.endswith(" holds values that are not finite")
    assert not [*made.output.rglob("*.safetensors"), *made.output.rglob("state.pt")]


@pytest.mark.slow
def test_a_student_names_its_teacher_and_carries_its_licence(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from pipelines.training.run import train
    from workers.checkpoints.file import read_checkpoint

    path = teacher_file(tmp_path / "t.safetensors")
    summary = train(config(**taught(path)))
    student = read_checkpoint(Path(summary.checkpoint))
    assert student.licence == "MIT; learned from weights under DECI-NC"
    assert student.provenance is not None
    (ancestor,) = student.provenance["ancestors"]
    assert ancestor["role"] == "teacher"
    assert ancestor["sha256"] == read_checkpoint(path).sha256
    assert ancestor["licence"] == "DECI-NC"
    assert summary.steps == 6


@pytest.mark.slow
def test_a_label_versions_knowledge_is_learned_and_its_model_is_an_ancestor(
    config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    from pipelines.training.run import train
    from pipelines.training.sources import read_data
    from workers.checkpoints.file import read_checkpoint

    run = labelled(open_store(str(tmp_path / "photos")), open_store(str(tmp_path / "run")))
    classes = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
    truth = write_coco(tmp_path / "val", [(40, 40)], [box(1, 1, 4, 4, 20, 20)], categories=classes)
    data = {
        "train": [{"labels": run.url}],
        "val": {"annotations": str(truth), "images": str(truth.parent)},
        "cache": {"dir": str(tmp_path / "cache"), "size": "1MB"},
    }
    stored = config(**data, distill={"mode": "stored"}, output=str(tmp_path / "stored"))
    samples = read_data(stored, stored=True).train
    soft = [samples.sample(index).soft for index in range(len(samples))]
    assert any(one is not None and np.isfinite(one.scores).any() for one in soft)

    student = read_checkpoint(Path(train(stored).checkpoint))
    plain = read_checkpoint(Path(train(config(**data, output=str(tmp_path / "plain"))).checkpoint))
    assert student.load_state_dict().keys() == plain.load_state_dict().keys()
    own, other = student.load_state_dict(), plain.load_state_dict()
    assert any(not torch.equal(own[key], other[key]) for key in own)
    assert student.provenance is not None
    (ancestor,) = student.provenance["ancestors"]
    assert ancestor["role"] == "labels"
    assert ancestor["sha256"] == run.record.identity.model_sha256

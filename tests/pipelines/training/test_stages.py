"""Stages of one config: each is a plain training that starts from the one before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config import TrainConfig
from pipelines.training.stages import marked_stages, stages_of
from storage.errors import ConfigError


def config(folder: Path, **more: Any) -> TrainConfig:
    for name in ("truth.json", "pool.json"):
        (folder / name).write_text("{}")
    part = {"annotations": str(folder / "truth.json"), "images": str(folder)}
    base = {
        "name": "cells", "output": str(folder / "out"), "train": part, "val": part,
        "test": {"held_out": part}, "lr": 0.002, "augment": {"mosaic": 0.5, "hue_deg": 9},
        "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    return TrainConfig.model_validate({**base, **more})


TWO = [
    {"name": "pretrain", "steps": 100, "augment": {"mosaic": 1.0}},
    {"name": "finetune", "epochs": 2.0, "lr": 0.0005, "freeze": "stem",
     "augment": {"mosaic": 0.0}},
]  # fmt: skip


def test_a_config_without_stages_is_its_own_only_stage(tmp_path: Path) -> None:
    plain = config(tmp_path, steps=10)
    (stage,) = stages_of(plain)
    assert stage.config is plain
    (marked,) = marked_stages(plain)
    assert marked.fingerprint == plain.fingerprint(precision="fp32")
    assert marked.config_fingerprint == plain.fingerprint(data=False, precision="fp32")


def test_each_stage_has_its_own_fields_and_starts_from_the_former(tmp_path: Path) -> None:
    first, second = stages_of(config(tmp_path, steps=10, stages=TWO))
    assert (first.name, second.name) == ("pretrain", "finetune")
    assert first.config.output == tmp_path / "out/stages/pretrain"
    assert second.config.output == tmp_path / "out"
    assert first.config.model.checkpoint is None
    assert second.config.model.checkpoint == str(first.config.output / "cells.safetensors")
    assert (first.config.steps, second.config.steps, second.config.epochs) == (100, None, 2.0)
    assert (first.config.lr, second.config.lr) == (0.002, 0.0005)
    assert (first.config.freeze, second.config.freeze) == ("none", "stem")
    # Sections are merged key by key.
    assert (first.config.augment.mosaic, first.config.augment.hue_deg) == (1.0, 9)
    assert (second.config.augment.mosaic, second.config.augment.hue_deg) == (0.0, 9)
    # The test sets are measured once, at the end.
    assert (len(first.config.test), len(second.config.test)) == (0, 1)
    assert first.config.stages == second.config.stages == ()


def test_a_stage_may_have_its_own_data(tmp_path: Path) -> None:
    pool = {"annotations": str(tmp_path / "pool.json"), "images": str(tmp_path / "pool")}
    stages = [{"name": "pretrain", "steps": 5, "train": pool}, {"name": "finetune", "steps": 5}]
    first, second = stages_of(config(tmp_path, stages=stages))
    assert first.config.train.annotations == tmp_path / "pool.json"
    assert second.config.train.annotations == tmp_path / "truth.json"


def test_the_fingerprint_of_a_stage_covers_the_stages_before_it(tmp_path: Path) -> None:
    def marks(**pretrain: Any) -> list[str]:
        stages = [{**TWO[0], **pretrain}, TWO[1]]
        return [s.fingerprint for s in marked_stages(config(tmp_path, steps=1, stages=stages))]

    same, again, other = marks(), marks(), marks(lr=0.5)
    assert same == again
    assert len({*same, *other}) == 4


def test_an_output_that_moved_with_its_stages_is_still_the_same_training(tmp_path: Path) -> None:
    made = [
        [s.fingerprint for s in marked_stages(config(tmp_path, output=out, stages=TWO))]
        for out in ("here", "there")
    ]
    assert made[0] == made[1]


def test_changed_data_of_a_former_stage_changes_the_mark_of_data_alone(tmp_path: Path) -> None:
    pool = {"annotations": str(tmp_path / "pool.json"), "images": str(tmp_path)}
    staged = config(tmp_path, stages=[{**TWO[0], "train": pool}, TWO[1]])
    before = marked_stages(staged)[-1]
    (tmp_path / "pool.json").write_text("{ }")
    after = marked_stages(staged)[-1]
    assert after.fingerprint != before.fingerprint
    assert after.config_fingerprint == before.config_fingerprint


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"name": "a", "steps": 1}, {"name": "a", "steps": 1}], "two stages are named a"),
        ([{"name": "a", "steps": 1, "output": "x"}], "stage a: output is the same in all stages"),
        ([{"name": "a", "steps": 1, "model": {}}], "stage a: model is the same in all stages"),
        ([{"name": "a", "lr": -1, "steps": 1}], "stage a cannot be used:\n  lr: a number above 0"),
        ([{"name": "a", "step": 1}], "stage a cannot be used:\n  step: unknown key; did you mean"),
        ([{"name": "a"}], "stage a cannot be used:\n  give either steps or epochs"),
        ([{"name": "a", "steps": 1, "val": {"annotations": "no.json", "images": "."}}],
         "stage a: no.json is not there"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_be_used_is_named(
    stages: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of(config(tmp_path, stages=stages))

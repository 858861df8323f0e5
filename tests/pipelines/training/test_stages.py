"""Stages of one config: each is a plain training that starts from the one before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.config import DataConfig, TrainConfig
from pipelines.training.stages import marked_stages, marks_at, stages_of
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


def first_weights(path: Path, content: bytes) -> dict[str, str]:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return {"checkpoint": str(path)}


def test_the_bytes_of_the_first_weights_count_and_their_place_does_not(tmp_path: Path) -> None:
    made = [
        marked_stages(config(tmp_path, steps=5, stages=stages, model=first_weights(path, content)))
        for stages in ([], TWO)
        for path, content in (
            (tmp_path / "a/x.safetensors", b"one"),
            (tmp_path / "b/y.safetensors", b"one"),
            (tmp_path / "a/x.safetensors", b"another"),
        )
    ]
    for here, moved, changed in (made[:3], made[3:]):
        marks = [(s[-1].fingerprint, s[-1].config_fingerprint) for s in (here, moved, changed)]
        assert marks[0] == marks[1]
        assert marks[0][0] != marks[2][0]
        assert marks[0][1] != marks[2][1]


@pytest.mark.parametrize("ended", [True, False])
def test_a_training_that_began_when_first_weights_counted_by_path_continues(
    tmp_path: Path, ended: bool
) -> None:
    asked = config(tmp_path, steps=5, model=first_weights(tmp_path / "a/x.safetensors", b"one"))
    assert isinstance(asked.train, DataConfig)
    former = asked.fingerprint(precision="fp32", by_path=True)
    former_config = asked.fingerprint(data=False, precision="fp32", by_path=True)
    (now,) = marked_stages(asked)
    assert now.fingerprint != former
    asked.output.mkdir()
    if ended:
        (asked.output / "summary.json").write_text(json.dumps({"fingerprint": former}))
    else:
        torch.save({"fingerprint": former, "config": former_config}, asked.output / "state.pt")
    (continued,) = marked_stages(asked)
    assert (continued.fingerprint, continued.config_fingerprint) == (former, former_config)
    # Its later stages follow from it.
    staged = asked.model_copy(update={"stages": config(tmp_path, stages=TWO).stages})
    first, second = stages_of(staged)
    first.config.output.mkdir(parents=True)
    earlier = first.config.fingerprint(precision="fp32", by_path=True)
    (first.config.output / "summary.json").write_text(json.dumps({"fingerprint": earlier}))
    plain = second.config.model_copy(
        update={"model": second.config.model.model_copy(update={"checkpoint": None})}
    )
    assert [s.fingerprint for s in marked_stages(staged)] == [
        earlier, plain.fingerprint(precision="fp32", after=earlier),
    ]  # fmt: skip


def test_damaged_files_in_an_output_are_no_training_to_continue(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[1")
    (tmp_path / "state.pt").write_bytes(b"\0" * 64)
    assert marks_at(tmp_path) == set()


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

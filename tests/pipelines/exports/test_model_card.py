"""The model card: front matter that Hugging Face reads, and what a checkpoint says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.demo.run import checkpoint_path
from pipelines.exports.model_card import model_card, read_card_facts
from storage.errors import CheckpointError
from storage.objects.protocols import StorageOptions
from tests.support.samples.checkpoint_samples import saved, weights
from workers.checkpoints.description import Description
from workers.checkpoints.file import save_checkpoint
from workers.images.preprocessing import Preprocessing

SCORES = {"map_": 0.5, "map50": 0.75, "map75": 0.6, "ar": 0.7, "per_class": {"a": 0.5}}


def checkpoint(path: Path, licence: str, **training: Any) -> Path:
    save_checkpoint(
        path,
        weights(2),
        Description(
            name="yolo_nas_s",
            arch_params=None,
            classes=("a|b", "<img src=x>"),
            preprocessing=Preprocessing(size=(64, 64), resize_to=(60, 60)),
            licence=licence,
            training=training,
        ),
    )
    return path


def front(card: str) -> dict[str, Any]:
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    found = yaml.safe_load(text)
    assert isinstance(found, dict)
    return found


def test_the_front_matter_has_what_hugging_face_wants(tmp_path: Path) -> None:
    source = {"source": "/data/cells/train.json", "digest": "0123", "images": 7, "objects": 9}
    path = checkpoint(
        tmp_path / "cells.safetensors", "Apache-2.0", val=SCORES, test={"hard": SCORES},
        sources=[source], step=40, images=7, objects=9, config={"lr": 0.001},
    )  # fmt: skip
    card = model_card(read_card_facts(str(path), StorageOptions()))
    found = front(card)
    assert (found["license"], found["library_name"]) == ("apache-2.0", "labelfleet")
    assert found["pipeline_tag"] == "object-detection"
    assert found["datasets"] == ["cells/train.json"]
    (index,) = found["model-index"]
    assert index["name"] == "cells"
    assert [r["dataset"]["name"] for r in index["results"]] == ["val", "hard"]
    figures = {m["type"]: m["value"] for m in index["results"][0]["metrics"]}
    assert figures == {"mAP": 0.5, "mAP50": 0.75, "mAP75": 0.6, "AR": 0.7}
    assert "lr: 0.001" in card
    assert "| cells/train.json | 7 | 9 | – | 0123 |" in card
    assert "/data" not in card
    assert r"| classes | 2: a\|b, \<img src=x\> |" in card  # text, and no cell of its own
    assert "Not for commercial use" not in card


def test_the_recipe_names_no_folder_of_the_machine_that_trained(tmp_path: Path) -> None:
    recipe = {
        "train": [
            {"annotations": "/home/ann/secret/truth.json", "images": "../secret/images"},
            {"labels": "s3://cells/runs/a", "version": "v0001"},
            {"labels": "file:///home/ann/secret/run"},
        ],
        "val": {"annotations": "secret/val.json", "images": "C:\\secret\\pictures"},
        "model": {"checkpoint": "/secret/first.safetensors", "arch": "secret/arch.yaml"},
        "distill": {"mode": "teacher", "teacher": "/secret/large.safetensors"},
        "report": ["tensorboard"],
        "lr": 0.001,
    }
    path = checkpoint(tmp_path / "cells.safetensors", "MIT", config=recipe)
    card = model_card(read_card_facts(str(path), StorageOptions()))
    assert "secret" not in card
    assert "ann" not in card.replace("annotations", "")
    for name in ("truth.json", "s3://cells/runs/a", "large.safetensors", "arch.yaml", "val.json",
                 "pictures", "tensorboard", "v0001"):  # fmt: skip
        assert name in card, name


def test_a_non_commercial_licence_is_marked(tmp_path: Path) -> None:
    licence = "MIT; learned from weights under CC-BY-NC-4.0"
    path = checkpoint(tmp_path / "cells.safetensors", licence)
    facts = read_card_facts(str(path), StorageOptions())
    assert facts.non_commercial
    found = front(model_card(facts))
    assert (found["license"], found["license_name"]) == ("other", "non-commercial")
    assert "non-commercial" in found["tags"]
    assert "model-index" not in found


def test_an_unstated_licence_is_unknown(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "cells.safetensors", "unstated")
    assert front(model_card(read_card_facts(str(path), StorageOptions())))["license"] == "unknown"


def test_the_demos_model_has_a_card() -> None:
    facts = read_card_facts(str(checkpoint_path()), StorageOptions())
    assert front(model_card(facts))["license"] == "apache-2.0"
    assert facts.metrics()["val"]["mAP"] == pytest.approx(0.873, abs=0.001)


def test_a_file_without_a_description_has_no_card(tmp_path: Path) -> None:
    path = saved(tmp_path / "plain.pth", {"net": weights()})
    with pytest.raises(CheckpointError, match="does not describe itself"):
        read_card_facts(str(path), StorageOptions())

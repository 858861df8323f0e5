"""Small trainings with distillation: both kinds change what is learned, a weight of 0 does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from storage.errors import ConfigError
from storage.objects.protocols import StorageOptions
from workers.checkpoints.description import Description
from workers.checkpoints.file import read_checkpoint, save_checkpoint
from workers.images.preprocessing import Preprocessing
from workers.spec import ModelSpec
from workers.training.batches import TrainingBatch
from workers.training.distillation.knowledge import (
    DistillWeights,
    Knowledge,
    StoredKnowledge,
    TeacherKnowledge,
)
from workers.training.distillation.teacher import check_teacher, load_teacher
from workers.training.options import FitOptions
from workers.training.trainer import Trainer
from workers.yolo_nas.network import build_network

ARCH = Path(__file__).resolve().parents[4] / "pipelines" / "assets" / "digits_nano_arch.yaml"
SIDE, CLASSES, STEPS = 64, ("a", "b", "c"), 6
HOW = Preprocessing(size=(SIDE, SIDE), resize_to=(60, 60))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arch(**heads: Any) -> str:
    params = yaml.safe_load(ARCH.read_text())
    params["heads"]["NDFLHeads"].update(heads)
    return json.dumps(params)


def network(seed: int, arch_params: str | None = None) -> nn.Module:
    torch.manual_seed(seed)
    return build_network("yolo_nas_s", arch_params or arch(), len(CLASSES))


def batches(first: int, end: int) -> Iterator[TrainingBatch]:
    """Images of noise, each with one box of a model and one of people."""
    for step in range(first, end):
        generator = torch.Generator().manual_seed(step)
        nan = float("nan")
        yield TrainingBatch(
            images=torch.rand((2, 3, SIDE, SIDE), generator=generator),
            targets=torch.tensor(
                [[0, 1, 20.0, 24, 20, 24], [0, 2, 40, 44, 30, 20], [1, 0, 30, 30, 36, 30]]
            ),
            ignore=torch.zeros((0, 5)),
            weights=torch.ones(3),
            checked=torch.tensor([[1, 0.0, 0, 20, 64]]),
            soft_scores=torch.tensor([[0.1, 0.7, 0.1], [nan] * 3, [0.6, 0.1, 0.1]]),
            spread=torch.tensor([[4.0, 5, 6, 4], [nan] * 4, [6, 6, 5, nan]]),
        )


def fitted(
    state: Path, knowledge: Knowledge | None, stops: tuple[int, ...] = (STEPS,)
) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Train to the last step, continuing after each stop; weights, and (loss, distilled)."""
    losses: list[tuple[float, float]] = []
    for last in stops:
        training = Trainer(
            network(0), len(CLASSES), FitOptions(steps=STEPS, warmup_steps=1, eval_every=100),
            fingerprint="one", state=state, knowledge=knowledge,
        )  # fmt: skip
        training.run(
            batches, lambda _: 0.0, lambda _: None,
            lambda report: losses.append((report.loss, report.distilled)),
            lambda last=last, of=training: of.progress.step >= last,  # type: ignore[misc]
        )  # fmt: skip
    return {k: v.clone() for k, v in training.ema_network.state_dict().items()}, losses


def saved(path: Path, arch_params: str, how: Preprocessing = HOW) -> ModelSpec:
    """A teacher of random weights, as a file."""
    save_checkpoint(
        path,
        network(7, arch_params).state_dict(),
        Description(
            name="yolo_nas_s",
            arch_params=arch_params,
            classes=CLASSES,
            preprocessing=how,
            licence="DECI-NC",
            training={},
        ),
    )
    found = read_checkpoint(path)
    return ModelSpec(
        str(path), found.sha256, "yolo_nas_s", arch_params, CLASSES, (0, 1, 2), how,
        "torch", "fp32", "cpu", 0.05, 0.7, 300,
    )  # fmt: skip


@pytest.fixture
def teacher(tmp_path: Path) -> nn.Module:
    spec = saved(tmp_path / "teacher.safetensors", arch())
    return load_teacher(spec, network(0), StorageOptions())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def knowledge(kind: str, teacher: nn.Module, weight: float = 1.0) -> Knowledge:
    weights = DistillWeights(weight)
    return StoredKnowledge(weights) if kind == "stored" else TeacherKnowledge(teacher, weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stored", "teacher"])
def test_distillation_changes_what_is_learned_and_continues_exactly(
    kind: str, teacher: nn.Module, tmp_path: Path
) -> None:
    plain, alone = fitted(tmp_path / "plain.pt", None)
    nothing, _ = fitted(tmp_path / "nothing.pt", knowledge(kind, teacher, weight=0.0))
    assert same(plain, nothing), "a weight of 0 is plain training, bit for bit"
    assert {round(distilled, 5) for _, distilled in alone} == {0}

    whole, losses = fitted(tmp_path / "whole.pt", knowledge(kind, teacher))
    parts, stopped = fitted(tmp_path / "parts.pt", knowledge(kind, teacher), (2, 5, STEPS))
    assert len(losses) == STEPS
    assert all(distilled > 0.01 for _, distilled in losses)
    assert losses[0][0] - losses[0][1] == pytest.approx(alone[0][0], rel=1e-5)
    assert not same(plain, whole)
    assert stopped == losses
    assert same(parts, whole)


@pytest.mark.slow
def test_the_fused_teacher_says_what_its_network_says(tmp_path: Path) -> None:
    """On inputs of another size than it was fused for, too, as multi-scale training has them."""
    spec = saved(tmp_path / "teacher.safetensors", arch())
    own = network(7).eval()
    asked = TeacherKnowledge(load_teacher(spec, network(0), StorageOptions()), DistillWeights())
    for side in (SIDE, 96):
        images = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(side))
        with torch.no_grad():
            _, wanted = own(images)
        found = asked.look(images)
        for index in (0, 1, 3, 5):
            assert torch.allclose(found[index], wanted[index], atol=1e-4), index


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"classes": ("a", "c", "b")}, "knows the classes"),
        ({"classes": ("a", "b")}, "knows the classes"),
        ({"preprocessing": replace(HOW, size=(96, 96))}, "trained with size"),
        ({"preprocessing": replace(HOW, scale=1.0)}, "trained with scale"),
        ({"preprocessing": replace(HOW, mean=(0.5, 0.5, 0.5))}, "trained with mean"),
        ({"preprocessing": replace(HOW, std=(0.2, 0.2, 0.2))}, "trained with std"),
        ({"preprocessing": replace(HOW, channels="BGR")}, "trained with channels"),
    ],
)
def test_a_teacher_of_other_classes_or_another_input_is_one_line(
    changed: dict[str, Any], said: str
) -> None:
    spec = ModelSpec(
        "models/teacher.pth", "", "yolo_nas_s", None, CLASSES, (0, 1, 2), HOW,
        "torch", "fp32", "cpu", 0.05, 0.7, 300,
    )  # fmt: skip
    check_teacher(spec, CLASSES, HOW)
    check_teacher(replace(spec, preprocessing=replace(HOW, padding="bottom_right")), CLASSES, HOW)
    with pytest.raises(ConfigError, match=said) as caught:
        check_teacher(replace(spec, **changed), CLASSES, HOW)
    assert "\n" not in caught.value.message
    assert "teacher.pth" in caught.value.message


@pytest.mark.slow
def test_a_teacher_with_other_bins_is_one_line(tmp_path: Path) -> None:
    spec = saved(tmp_path / "teacher.safetensors", arch(reg_max=12))
    with pytest.raises(ConfigError, match="reg_max 12; the student has 16") as caught:
        load_teacher(spec, network(0), StorageOptions())
    assert "\n" not in caught.value.message


@pytest.mark.slow
def test_a_teacher_with_other_strides_is_one_line(tmp_path: Path) -> None:
    params = json.loads(arch())
    heads = params["heads"]["NDFLHeads"]["heads_list"]
    for head in heads:
        next(iter(head.values()))["stride"] *= 2
    spec = saved(tmp_path / "teacher.safetensors", json.dumps(params))
    with pytest.raises(ConfigError, match=r"strides \(16, 32, 64\); the student has \(8, 16, 32\)"):
        load_teacher(spec, network(0), StorageOptions())

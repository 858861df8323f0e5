"""One update of the weights: rates by part, frozen parts, clipping, parts of a batch."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from storage.errors import ConfigError
from workers.training.batches import TrainingBatch
from workers.training.options import FitOptions, LrFactors
from workers.training.recipe.parts import freeze, parameter_groups
from workers.training.recipe.update import Update, split

OPTIONS = FitOptions(steps=10, lr=0.01)


class Network(nn.Module):
    """The parts of a YOLO-NAS by name, and little in them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Module()
        self.backbone.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.backbone.stage1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.heads = nn.Conv2d(4, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class maps."""
        seen = self.backbone.stage1(self.backbone.stem(images))  # type: ignore[operator]
        return self.heads(self.neck(seen))  # type: ignore[no-any-return]


def images() -> torch.Tensor:
    return torch.rand((4, 3, 9, 9), generator=torch.Generator().manual_seed(1))


def changed(options: FitOptions) -> dict[str, float]:
    """Largest change of each weight and buffer by one update."""
    network = Network().train()
    before = copy.deepcopy(network.state_dict())
    freeze(network, options.freeze)
    update = Update(network, options)
    update.begin(options.lr)
    update.add(network(images()).square().mean())
    update.apply()
    after = network.state_dict()
    return {k: float((after[k].float() - before[k].float()).abs().max()) for k in before}


def test_equal_factors_give_the_groups_of_earlier_versions() -> None:
    network = Network()
    groups = parameter_groups(network, OPTIONS)
    assert [p.shape for p in groups[0]["params"]] == [
        p.shape for p in network.parameters() if p.ndim > 1
    ]
    assert [p.shape for p in groups[1]["params"]] == [
        p.shape for p in network.parameters() if p.ndim <= 1
    ]
    assert [g["weight_decay"] for g in groups] == [OPTIONS.weight_decay, 0.0]
    assert len(groups) == 2


def test_each_part_learns_at_its_own_rate() -> None:
    # AdamW's first step changes every weight by its rate, whatever the gradient.
    moved = changed(replace(OPTIONS, weight_decay=0.0, lr_factors=LrFactors(0.1, 0.5, 1.0)))
    assert moved["backbone.stem.0.weight"] == pytest.approx(0.001, rel=0.05)
    assert moved["backbone.stage1.0.weight"] == pytest.approx(0.001, rel=0.05)
    assert moved["neck.0.weight"] == pytest.approx(0.005, rel=0.05)
    assert moved["heads.weight"] == pytest.approx(0.01, rel=0.05)


def test_every_weight_is_in_exactly_one_group() -> None:
    network = Network()
    groups = parameter_groups(network, replace(OPTIONS, lr_factors=LrFactors(0.1, 0.1, 2.0)))
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize(
    ("frozen", "still"),
    [("none", []), ("stem", ["backbone.stem."]), ("backbone", ["backbone."])],
)
def test_a_frozen_part_keeps_weights_and_statistics_and_the_rest_learns(
    frozen: str, still: list[str]
) -> None:
    moved = changed(replace(OPTIONS, freeze=frozen))  # type: ignore[arg-type]
    for name, change in moved.items():
        assert (change == 0) == any(name.startswith(part) for part in still), name
    assert any("running_mean" in name and change > 0 for name, change in moved.items())


def test_a_network_without_the_part_to_freeze_is_refused() -> None:
    with pytest.raises(ConfigError, match="freeze: stem, but the network has no part"):
        freeze(nn.Linear(2, 2), "stem")


@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
def test_the_gradient_is_clipped_to_its_norm(clip_norm: float) -> None:
    network = Network().train()
    update = Update(network, replace(OPTIONS, clip_norm=clip_norm))
    update.begin(0.0)
    loss = 1e3 * network(images()).square().mean()
    (wanted,) = torch.autograd.grad(loss, [network.heads.weight], retain_graph=True)
    update.add(loss)
    update.apply()
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    found = network.heads.weight.grad
    assert found is not None
    if clip_norm == 0.5:
        assert norm.item() == pytest.approx(0.5, rel=1e-3)
        assert torch.allclose(found / found.norm(), wanted / wanted.norm(), atol=1e-5)
    else:
        assert torch.allclose(found, wanted)


def test_a_divided_sum_of_gradients_is_that_of_the_divided_loss() -> None:
    grads = []
    for divided in (False, True):
        network = Network().eval()
        update = Update(network, OPTIONS)
        update.begin(0.0)
        one, two = network(images()[:2]).square().sum(), network(images()[2:]).square().sum()
        if divided:
            update.add((one + two) / 7)
            update.apply()
        else:
            update.add(one)
            update.add(two)
            update.apply(7.0)
        grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_the_state_of_an_earlier_version_is_taken_in() -> None:
    old = torch.optim.AdamW(
        [{"params": list(Network().parameters()), "weight_decay": 0.0}, {"params": []}], lr=0.01
    ).state_dict()
    for number, group in enumerate(old["param_groups"]):
        wanted = parameter_groups(Network(), OPTIONS)[number]["params"]
        first = 0 if number == 0 else len(old["param_groups"][0]["params"])
        group["params"] = list(range(first, first + len(wanted)))
        assert "lr_factor" not in group
    update = Update(Network(), OPTIONS)
    update.load({"optimizer": old})
    update.begin(0.003)
    assert [g["lr"] for g in update.optimizer.param_groups] == [0.003, 0.003]


def test_the_parts_of_a_batch_hold_its_rows_each_once() -> None:
    targets = torch.tensor([[0, 1, 5.0, 5, 2, 2], [2, 0, 6, 6, 2, 2], [3, 2, 7, 7, 2, 2],
                            [1, 1, 8, 8, 2, 2]])  # fmt: skip
    batch = TrainingBatch(
        torch.arange(4).float().view(4, 1, 1, 1).expand(4, 3, 8, 8),
        targets,
        torch.tensor([[1, 0.0, 0, 4, 4], [3, 1, 1, 2, 2]]),
        torch.tensor([0.1, 0.3, 0.4, 0.2]),
        torch.tensor([[2, 0.0, 0, 8, 8]]),
        torch.arange(12).float().view(4, 3),
        None,
        torch.tensor([[1, 2, 0.0, 0, 8, 8], [2, 0, 0, 0, 4, 4]]),
    )
    first, second = split(batch, 2)
    assert first.images[:, 0, 0, 0].tolist() == [0, 1]
    assert second.images[:, 0, 0, 0].tolist() == [2, 3]
    assert first.targets[:, :3].tolist() == [[0, 1, 5], [1, 1, 8]]
    assert second.targets[:, :3].tolist() == [[0, 0, 6], [1, 2, 7]]
    assert first.weights.tolist() == pytest.approx([0.1, 0.2])
    assert second.weights.tolist() == pytest.approx([0.3, 0.4])
    assert first.ignore.tolist() == [[1, 0, 0, 4, 4]]
    assert second.ignore.tolist() == [[1, 1, 1, 2, 2]]
    assert len(first.checked) == 0
    assert second.checked.tolist() == [[0, 0, 0, 8, 8]]
    assert first.silent is not None
    assert second.silent is not None
    assert first.silent.tolist() == [[1, 2, 0, 0, 8, 8]]
    assert second.silent.tolist() == [[0, 0, 0, 0, 4, 4]]
    assert second.soft_scores is not None
    assert second.soft_scores[:, 0].tolist() == [3, 6]
    assert batch.targets is targets
    assert targets[1, 0] == 2

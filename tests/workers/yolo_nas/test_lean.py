"""A lean network computes and learns what the plain one does, and keeps its names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import Tensor, nn

pytestmark = pytest.mark.slow  # super-gradients takes seconds to import

ARCH = Path(__file__).resolve().parents[3] / "pipelines" / "assets" / "digits_nano_arch.yaml"
SIDE = 96
TARGETS = torch.tensor([[0, 1, 30.0, 30, 24, 24], [1, 2, 60, 50, 30, 40], [1, 0, 20, 70, 16, 9]])


def plain(seed: int = 0) -> nn.Module:
    """A network with weights that a training has moved: no norm is 1 and 0, no factor is 1."""
    from workers.yolo_nas.network import build_network

    torch.manual_seed(seed)
    network = build_network("yolo_nas_s", json.dumps(yaml.safe_load(ARCH.read_text())), 3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return network.train()


def lean_copy(network: nn.Module) -> nn.Module:
    from workers.yolo_nas.lean import lean

    copied = copy.deepcopy(network)
    lean(copied)
    return copied


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.rand((count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    from workers.training.loss import RegionLoss

    _, raw = network(images().to(next(network.parameters()).dtype))
    outputs: tuple[Any, ...] = (raw[0].float(), raw[1].float(), *raw[2:])
    loss, parts = RegionLoss(3)(outputs, TARGETS)
    loss.backward()
    found = {n: p.grad.double() for n, p in network.named_parameters() if p.grad is not None}
    return parts.double(), found


def error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Distance of all gradients together, as a share of their length."""
    off = sum(float((found[n] - true[n]).square().sum()) for n in true)
    return float((off / sum(float(g.square().sum()) for g in true.values())) ** 0.5)


def test_the_loss_and_all_gradients_are_as_near_to_float64s_as_the_plain_networks() -> None:
    network = plain()
    wide = copy.deepcopy(network).double()
    wide.heads.proj_conv = wide.heads.proj_conv.double()  # type: ignore[union-attr]
    lean_network = lean_copy(network)

    true, true_gradients = loss_and_gradients(wide)
    _, gradients = loss_and_gradients(network)
    lean_parts, lean_gradients = loss_and_gradients(lean_network)

    assert lean_gradients.keys() == gradients.keys()
    assert torch.allclose(lean_parts, true, rtol=1e-5)
    assert error(lean_gradients, true_gradients) < max(1e-4, 3 * error(gradients, true_gradients))
    for name, running in network.named_buffers():
        own = lean_network.get_buffer(name)
        assert torch.allclose(own.float(), running.float(), rtol=1e-4, atol=1e-5), name


def test_the_state_dict_and_eval_mode_stay_as_they_are() -> None:
    network = plain()
    lean_network = lean_copy(network)

    own, theirs = lean_network.state_dict(), network.state_dict()
    assert list(own) == list(theirs)
    assert all(torch.equal(own[name], theirs[name]) for name in own)

    (boxes, scores), _ = network.eval()(images())
    (lean_boxes, lean_scores), _ = lean_network.eval()(images())
    assert torch.equal(boxes, lean_boxes)
    assert torch.equal(scores, lean_scores)


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
def test_statistics_are_right_wherever_the_mean_lies(mean: float) -> None:
    from workers.yolo_nas.lean import LeanNorm

    x = torch.randn((3, 5, 48, 80), generator=torch.Generator().manual_seed(2)).add_(mean)
    x[:, 4] = 2.5  # a channel without any spread
    lean_norm, norm = LeanNorm(5).train(), nn.BatchNorm2d(5).double().train()
    wide, narrow = x.double().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    true, found = norm(wide), lean_norm(narrow)
    (true * weights).sum().backward()
    (found * weights).sum().backward()

    assert torch.allclose(found[:, :4].double(), true[:, :4], rtol=1e-4, atol=1e-3)
    assert narrow.grad is not None
    assert wide.grad is not None
    assert torch.allclose(narrow.grad[:, :4].double(), wide.grad[:, :4], rtol=1e-3, atol=1e-3)
    for own, other in zip(lean_norm.buffers(), norm.buffers(), strict=True):
        assert torch.allclose(own.double(), other.double(), rtol=1e-5, atol=1e-6)


def test_a_batch_of_one_value_a_channel_is_refused_as_torch_does() -> None:
    from workers.yolo_nas.lean import LeanNorm

    with pytest.raises(ValueError, match="more than 1 value"):
        LeanNorm(2).train()(torch.ones((1, 2, 1, 1)))


@pytest.mark.parametrize(("kernel", "size"), [(5, 10), (13, 7)])
def test_pooling_takes_the_same_maxima_and_sends_gradients_to_the_same_places(
    kernel: int, size: int
) -> None:
    from workers.yolo_nas.lean import LeanPool

    # Whole numbers: many maxima are equal, and the first of them counts.
    x = torch.randint(0, 4, (2, 9, size, size), generator=torch.Generator().manual_seed(4)).float()
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    pool = nn.MaxPool2d(kernel, 1, kernel // 2)
    plain_out = pool(first)
    lean_out = LeanPool(kernel, 1, kernel // 2)(second)
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(5))
    (plain_out * weights).sum().backward()
    (lean_out * weights).sum().backward()

    assert torch.equal(plain_out, lean_out)
    assert lean_out.is_contiguous()
    assert first.grad is not None
    assert second.grad is not None
    assert torch.allclose(first.grad, second.grad)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", True), ("bf16", False)])
def test_a_training_on_a_cpu_in_fp32_is_lean_and_its_average_is_plain(
    tmp_path: Path, precision: Literal["fp32", "bf16"], expected: bool
) -> None:
    from workers.training.options import FitOptions
    from workers.training.trainer import Trainer
    from workers.yolo_nas.lean import LeanBlock, LeanHeads, LeanNorm, LeanPool

    lean_classes = {LeanBlock, LeanHeads, LeanNorm, LeanPool}
    network = plain()
    options = FitOptions(steps=1, warmup_steps=1, precision=precision)
    trainer = Trainer(network, 3, options, fingerprint="", state=tmp_path / "state.pt")

    found = {type(module) for module in network.modules()}
    assert (lean_classes <= found) is expected
    assert expected or not lean_classes & found
    assert not lean_classes & {type(module) for module in trainer.ema_network.modules()}

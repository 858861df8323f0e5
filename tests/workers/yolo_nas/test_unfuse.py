"""What a fused network learned can be put back into the network that it came from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from workers.checkpoints.file import read_checkpoint
from workers.yolo_nas.network import build_network, fuse, load_weights
from workers.yolo_nas.unfuse import unfused

SIZE = (64, 64)


@pytest.mark.slow  # super-gradients takes seconds to import
def test_fusing_again_gives_the_weights_that_were_learned(nano_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(nano_checkpoint)
    assert checkpoint.name is not None
    assert checkpoint.classes is not None
    built = build_network(checkpoint.name, checkpoint.arch_params, len(checkpoint.classes))
    load_weights(built, checkpoint)
    before = copy.deepcopy(built.state_dict())
    learned = fuse(copy.deepcopy(built), SIZE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in learned.parameters():
            weight += 1e-3 * torch.randn(weight.shape, generator=generator)
    made = unfused(built, learned, SIZE)
    again = dict(fuse(copy.deepcopy(made), SIZE).named_parameters())
    for name, weight in learned.named_parameters():
        assert torch.allclose(again[name], weight, atol=1e-5), name
    images = torch.rand((1, 3, *SIZE), generator=generator)
    made.eval()
    with torch.no_grad():
        assert torch.allclose(made(images)[1][0], learned(images)[1][0], atol=1e-4)
    assert made.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())

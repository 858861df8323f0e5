"""The form in which a network learns: as it was built, or as INT8 will compute it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from workers.spec import RuntimeName
from workers.training.int8.simulated import find_ranges, simulate
from workers.yolo_nas.network import fuse
from workers.yolo_nas.unfuse import unfused


class Form(Protocol):
    """What becomes of the network that learns."""

    @property
    def network(self) -> nn.Module:
        """The one that learns."""

    def deployed(self, network: nn.Module) -> nn.Module:
        """Return the network in its present state, fused, as validation runs it."""

    def weights(self, network: nn.Module) -> nn.Module:
        """Return the network whose weights are kept: one as ``build_network`` makes them."""


class AsBuilt:
    """The network learns in the form that it was built in."""

    def __init__(self, network: nn.Module, size: tuple[int, int]) -> None:
        self.network, self._size = network, size

    def deployed(self, network: nn.Module) -> nn.Module:
        """See ``Form``."""
        return fuse(copy.deepcopy(network), self._size)

    def weights(self, network: nn.Module) -> nn.Module:
        """See ``Form``."""
        return network


class AsInt8:
    """The network learns fused, with the rounding of INT8 simulated.

    Args:
        built: of super-gradients, with the weights to start from; left as it is.
        size: [height, width] of the input.
        runtime: that will run it; each has a grid of its own.
        images: batches to find the ranges of activations on, float32 [B, 3, H, W].
    """

    def __init__(
        self,
        built: nn.Module,
        size: tuple[int, int],
        runtime: RuntimeName,
        images: Iterable[Tensor],
    ) -> None:
        self._built, self._size = built, size
        self.network = simulate(fuse(copy.deepcopy(built), size), runtime)
        find_ranges(self.network, images)

    def deployed(self, network: nn.Module) -> nn.Module:
        """See ``Form``."""
        return copy.deepcopy(network).requires_grad_(False)

    def weights(self, network: nn.Module) -> nn.Module:
        """See ``Form``."""
        return unfused(self._built, network, self._size)

"""Runs the network with torch: on a CPU as it is, on a GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.detectors.graph import GraphDetector, detector_around
from workers.detectors.nms import Selected
from workers.detectors.selection import DenseNetwork, SelectedDetector
from workers.runtimes.device_queue import DeviceQueue
from workers.spec import ModelSpec


class TorchSession:
    """A ``Session`` on the CPU."""

    def __init__(self, network: SelectedDetector) -> None:
        self._network = network

    @torch.inference_mode()
    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """See ``Session.run``."""
        return Selected(*(t.numpy() for t in self._network(torch.from_numpy(batch))))


class CapturedNetwork:
    """A ``Program``: a CUDA graph, which spares the launch of some 400 kernels, most of the time
    of a small batch.

    Args:
        network: on the device.
        shape: of its batches, uint8 [B, H, W, 3].
        stream: where it is captured.
    """

    def __init__(self, network: SelectedDetector, shape: tuple[int, ...], stream: Any) -> None:
        self._images = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN chooses its algorithms before, not while, it is captured
                network(self._images)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Of this thread only: others may allocate page-locked memory meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs: tuple[Tensor, ...] = network(self._images)

    @property
    def outputs(self) -> list[tuple[Sequence[int], torch.dtype]]:
        """See ``Program.outputs``."""
        return [(tensor.shape, tensor.dtype) for tensor in self._outputs]

    def run(self, images: Tensor, outputs: Sequence[Tensor]) -> None:
        """See ``Program.run``."""
        self._images.copy_(images)
        self._graph.replay()
        for there, here in zip(self._outputs, outputs, strict=True):
            here.copy_(there)


def torch_session(dense: DenseNetwork, spec: ModelSpec) -> TorchSession | DeviceQueue:
    """Return the ``Session`` of a dense network that is on its device already."""
    network = SelectedDetector(dense, spec.keep, len(spec.classes))
    if spec.device == "cuda":
        return DeviceQueue(partial(CapturedNetwork, network))
    return TorchSession(network)


def torch_detector(dense: DenseNetwork, spec: ModelSpec) -> GraphDetector:
    """Return the ``Detector`` of a dense network that is on its device already."""
    return detector_around(torch_session(dense, spec), spec)

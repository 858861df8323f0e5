"""Runs the network with torch: on a CPU as it is, on a GPU as CUDA graphs, one a batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dense import DenseNetwork, SelectedDetector
from workers.graph_detector import GraphDetector
from workers.postprocess import Selected
from workers.spec import ModelSpec

_KEPT_GRAPHS = 4  # batch sizes: the full one, and partial ones at the end of the work


class TorchSession:
    """A ``Session`` on the CPU."""

    def __init__(self, network: SelectedDetector) -> None:
        self._network = network

    @torch.inference_mode()
    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """See ``Session.run``."""
        return Selected(*(t.numpy() for t in self._network(torch.from_numpy(batch))))


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    staged: Tensor  # pinned uint8 [B, H, W, 3]
    images: Tensor  # the same on the device
    outputs: tuple[Tensor, ...]
    fetched: tuple[Tensor, ...]  # pinned


class CudaSession:
    """A ``Session`` on one GPU: replayed CUDA graphs, pinned buffers, one synchronisation a batch.

    A graph spares the launch of some 400 kernels, which is most of the time of a small batch.
    """

    def __init__(self, network: SelectedDetector) -> None:
        self._network = network
        self._graphs: dict[int, _Captured] = {}
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """See ``Session.run``."""
        captured = self._graphs.get(len(batch)) or self._capture(batch)
        captured.staged.numpy()[:] = batch
        with torch.cuda.stream(self._stream):
            captured.images.copy_(captured.staged, non_blocking=True)
            captured.graph.replay()
            for there, here in zip(captured.outputs, captured.fetched, strict=True):
                here.copy_(there, non_blocking=True)
        self._stream.synchronize()
        return Selected(*(t.numpy() for t in captured.fetched))

    def _capture(self, batch: NDArray[np.uint8]) -> _Captured:
        if len(self._graphs) == _KEPT_GRAPHS:
            self._graphs.pop(min(self._graphs))  # the full batch comes again, the small ones may
        staged = torch.empty(batch.shape, dtype=torch.uint8, pin_memory=True)
        staged.numpy()[:] = batch
        with torch.cuda.stream(self._stream):
            images = staged.to("cuda", non_blocking=True)
            for _ in range(3):  # cuDNN chooses its algorithms before, not while, it is captured
                self._network(images)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            outputs = self._network(images)
        fetched = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in outputs)
        captured = _Captured(graph, staged, images, outputs, fetched)
        self._graphs[len(batch)] = captured
        return captured


def torch_session(dense: DenseNetwork, spec: ModelSpec) -> TorchSession | CudaSession:
    """The ``Session`` of a dense network that is on its device already."""
    network = SelectedDetector(dense, spec.keep, len(spec.classes))
    return CudaSession(network) if spec.device == "cuda" else TorchSession(network)


def torch_detector(dense: DenseNetwork, spec: ModelSpec) -> GraphDetector:
    """The ``Detector`` of a dense network that is on its device already."""
    return GraphDetector(torch_session(dense, spec), spec)

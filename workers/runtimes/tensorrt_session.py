"""Runs an exported graph with TensorRT on one GPU; the engine is built here, never fetched.

An engine is machine code for one kind of GPU: it is built from the ONNX graph on each machine,
which takes minutes once, and kept in the user's own cache. The graph states the type of every
tensor (strongly typed), so that boxes are decoded in float32 whatever the network runs in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.errors import ModelError
from workers.checkpoints.cache import file_sha256, private_folder
from workers.detectors.nms import OUTPUTS
from workers.local_folders import cache_folder
from workers.runtimes.artefacts import Artefact
from workers.runtimes.device_queue import DeviceQueue

INPUT = "images"
_TYPES = {"anchors": torch.int32}
MAX_BATCH = 128
_OPTIMAL_BATCH = 32
_WORKSPACE_BYTES = 4 << 30

log = logging.getLogger("labelfleet.tensorrt")


def import_tensorrt() -> Any:
    """Return the ``tensorrt`` module. Raises ModelError when it, or a GPU, is not there."""
    try:
        import tensorrt
    except ImportError as exc:
        raise ModelError(
            f"TensorRT does not load here: {exc}", hint="pip install tensorrt, on a GPU machine"
        ) from exc
    if not torch.cuda.is_available():
        raise ModelError("TensorRT needs an NVIDIA GPU, and torch sees none on this machine")
    return tensorrt


class EngineRun:
    """A ``Program``: the engine at one batch size."""

    def __init__(self, context: Any, shape: tuple[int, ...]) -> None:
        self._context, self._shape = context, shape
        context.set_input_shape(INPUT, shape)
        self.outputs = [
            (tuple(context.get_tensor_shape(name)), _TYPES.get(name, torch.float32))
            for name in OUTPUTS
        ]

    def run(self, images: Tensor, outputs: Sequence[Tensor]) -> None:
        """See ``Program.run``."""
        context = self._context
        context.set_input_shape(INPUT, self._shape)
        for name, tensor in zip((INPUT, *OUTPUTS), (images, *outputs), strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ModelError("TensorRT could not run the batch", hint="see its log above")


class TensorRtEngine:
    """The graph as this machine's engine; ``session`` runs it.

    Raises:
        ModelError: TensorRT or a GPU is not there, or no engine can be built.
    """

    def __init__(self, artefact: Artefact) -> None:
        self._trt = import_tensorrt()
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        plan = self._plan(artefact.files[artefact.main])
        runtime = self._trt.Runtime(self._logger)
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ModelError("TensorRT refuses the engine that it built itself")
        self._context = self._engine.create_execution_context()

    def session(self) -> DeviceQueue:
        """Batches up to 128."""
        return DeviceQueue(self._prepared)

    def _prepared(self, shape: tuple[int, ...], stream: Any) -> EngineRun:
        if shape[0] > MAX_BATCH:
            raise ModelError(f"the engine takes up to {MAX_BATCH} images a batch, not {shape[0]}")
        return EngineRun(self._context, shape)

    def _plan(self, graph: Path) -> bytes:
        """Return the serialised engine: from this user's cache, or built now."""
        identity = [file_sha256(graph), self._trt.__version__, torch.cuda.get_device_name()]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        folder = private_folder(cache_folder() / "tensorrt")  # an engine is code
        kept = folder / f"{name}.plan"
        if kept.is_file():
            return kept.read_bytes()
        log.warning("building a TensorRT engine for %s; this takes minutes, once", identity[2])
        plan = self._build(graph)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            part.write(plan)
        os.replace(part.name, kept)  # noqa: PTH105  whole or not at all
        return plan

    def _build(self, graph: Path) -> bytes:
        trt = self._trt
        builder = trt.Builder(self._logger)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(typed)
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(graph.read_bytes()):
            errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise ModelError(f"TensorRT cannot read {graph.name}: {errors[:300]}")
        _drop_other_outputs(network)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
        profile = builder.create_optimization_profile()
        size = tuple(network.get_input(0).shape)[1:]
        profile.set_shape(INPUT, *((n, *size) for n in (1, _OPTIMAL_BATCH, MAX_BATCH)))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ModelError("TensorRT could not build an engine", hint="see its log above")
        return bytes(plan)


def _drop_other_outputs(network: Any) -> None:
    for tensor in [network.get_output(i) for i in range(network.num_outputs)]:
        if tensor.name not in OUTPUTS:
            network.unmark_output(tensor)

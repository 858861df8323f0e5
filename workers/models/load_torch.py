"""A detector of a resolved model in torch."""

from __future__ import annotations

import torch

from storage.errors import ModelError
from storage.objects.protocols import StorageOptions
from workers.detectors.protocol import Detector
from workers.runtimes.torch_session import torch_detector
from workers.spec import ModelSpec
from workers.yolo_nas.network import load_dense

_PRECISIONS = ("fp32", "bf16", "fp16")


def load_detector(spec: ModelSpec, options: StorageOptions, *, threads: int) -> Detector:
    """Return the model of ``spec`` on torch, ready on its device; other runtimes: ``runtimes``.

    Args:
        spec: every choice made.
        options: how to reach the checkpoint.
        threads: torch threads of this process on a CPU.

    Raises:
        CheckpointError: the checkpoint cannot be had, read, or fitted to the network.
        ModelError: the device is not there, or torch does not do that precision.
    """
    _check_device(spec)
    torch.set_num_threads(threads)
    dense = load_dense(spec, options)
    dense.set_precision(spec.precision)
    dense.to(spec.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch_detector(dense, spec)


def _check_device(spec: ModelSpec) -> None:
    if spec.runtime != "torch" or spec.precision not in _PRECISIONS:
        raise ModelError(f"runtime {spec.runtime} with precision {spec.precision} is not available")
    if spec.device == "cuda":
        if not torch.cuda.is_available():
            raise ModelError(
                "the run asks for cuda, and torch sees no CUDA device on this machine",
                hint="install a CUDA build of torch, or start a new run on cpu",
            )
        # fp32 means fp32: TF32 moves boxes.
        torch.backends.cudnn.allow_tf32 = spec.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = spec.precision != "fp32"

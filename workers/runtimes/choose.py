"""The same network on torch, ONNX Runtime, OpenVINO, TensorRT: which one, and loading it."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Collection
from typing import Literal

from storage.errors import ConfigError
from workers.spec import DeviceName, ModelSpec, PrecisionName, RuntimeName

Auto = Literal["auto"]

# What each can do, by device; the first precision is the safe default.
PRECISIONS: dict[tuple[RuntimeName, DeviceName], tuple[PrecisionName, ...]] = {
    ("torch", "cpu"): ("fp32", "bf16", "fp16"),
    ("torch", "cuda"): ("fp16", "bf16", "fp32"),
    ("onnx", "cpu"): ("fp32", "int8"),
    ("openvino", "cpu"): ("fp32", "bf16", "int8"),
    ("tensorrt", "cuda"): ("fp16", "fp32", "int8"),
}
_MODULES: dict[RuntimeName, str] = {
    "torch": "torch",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
}
# Fastest first, as measured by benchmarks/runtimes.py. TensorRT takes minutes to build an engine
# on every machine, so it is used only on request.
_PREFERRED: dict[DeviceName, tuple[RuntimeName, ...]] = {
    "cpu": ("openvino", "onnx", "torch"),
    "cuda": ("torch",),
}
_INSTALL = {
    "openvino": "pip install 'labelfleet[openvino]'",
    "tensorrt": "pip install tensorrt, on a machine with an NVIDIA GPU",
}


def installed() -> frozenset[RuntimeName]:
    """Return the runtimes whose packages are here; nothing is imported."""
    return frozenset(
        name for name, module in _MODULES.items() if importlib.util.find_spec(module) is not None
    )


def choose_runtime(
    runtime: Auto | RuntimeName,
    precision: Auto | PrecisionName,
    device: DeviceName,
    *,
    present: Collection[RuntimeName] | None = None,
    machine: str = platform.machine(),
) -> tuple[RuntimeName, PrecisionName]:
    """Resolve ``auto`` for runtime and precision.

    ``runtime: auto`` is the fastest installed one that does the precision asked for;
    ``precision: auto`` is fp32 on a CPU (bf16 moves boxes by pixels) and fp16 on a GPU.

    Args:
        present: the installed runtimes; None: look.
        machine: the CPU's architecture; OpenVINO is chosen on x86 only.

    Raises:
        ConfigError: no such combination, or it is not installed.
    """
    here = installed() if present is None else present
    if runtime == "auto":
        runtime = _fastest(precision, device, here, machine)
    possible = PRECISIONS.get((runtime, device))
    if possible is None:
        raise ConfigError(
            f"model.runtime: {runtime} does not run on {device} here",
            hint="leave it out to get the fastest one that does",
        )
    if precision != "auto" and precision not in possible:
        raise ConfigError(
            f"model.precision: {runtime} on {device} takes {', '.join(sorted(possible))}, "
            f"not {precision}",
            hint="`runtime: auto` chooses one that does" if precision == "int8" else None,
        )
    if runtime not in here:
        raise ConfigError(
            f"model.runtime: {runtime} is not installed", hint=_INSTALL.get(runtime, "`make setup`")
        )
    return runtime, possible[0] if precision == "auto" else precision


def _fastest(
    precision: Auto | PrecisionName,
    device: DeviceName,
    present: Collection[RuntimeName],
    machine: str,
) -> RuntimeName:
    asked = precision if precision != "auto" else PRECISIONS["torch", device][0]
    order = _PREFERRED[device]
    if machine.lower() not in ("x86_64", "amd64"):
        order = tuple(name for name in order if name != "openvino")
    able = [name for (name, on), can in PRECISIONS.items() if on == device and asked in can]
    fitting = [name for name in (*order, *able) if name in able]
    return next((name for name in fitting if name in present), fitting[0])


def needs_artefact(spec: ModelSpec) -> bool:
    """Return whether the runtime loads an exported graph, and not the checkpoint."""
    return spec.runtime != "torch"

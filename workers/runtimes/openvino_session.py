"""Runs an exported graph with OpenVINO on a CPU. Imports neither torch nor super-gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import ModelError
from workers.detectors.nms import OUTPUTS, RAW, Selected
from workers.runtimes.artefacts import Artefact
from workers.spec import PrecisionName

WEIGHTS = "model.bin"  # beside model.xml; an ONNX file holds its own


def import_openvino() -> Any:
    """Return the ``openvino`` module, without its usage statistics.

    openvino and nncf report to a server of their makers, and leave an id in the home directory,
    through the package openvino_telemetry; both do without where it is not installed, so it is
    made not to be.

    Raises:
        ModelError: it is not installed, or does not load.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # import fails
    try:
        import openvino
    except ImportError as exc:
        raise ModelError(
            f"OpenVINO does not load here: {exc}", hint="pip install 'labelfleet[openvino]'"
        ) from exc
    return openvino


class OpenVinoSession:
    """A ``Session`` on the CPU.

    fp32 runs as one model (by itself OpenVINO takes bf16 where the CPU has it). bf16 and int8 run
    the network as one model and decode boxes in another one, in float32. In bf16 a coordinate of
    600 px has steps of 4 px. In int8, as one model that takes batches of any size, OpenVINO 2026.4
    computes other logits than without the decoding, or with batches of one fixed size: the demo's
    model then lost 33 points of mAP, and so loses less than 5.
    """

    def __init__(self, artefact: Artefact, precision: PrecisionName, *, threads: int) -> None:
        ov = import_openvino()
        core = ov.Core()
        if precision == "bf16" and not has_bf16(core):
            raise ModelError(
                "this CPU has no bf16, and the run was created with it",
                hint="use machines with AVX-512 BF16 or AMX, or a new run with `precision: fp32`",
            )
        model = core.read_model(artefact.files[artefact.main], artefact.files.get(WEIGHTS))
        self._requests = [
            core.compile_model(part, "CPU", _settings(hint, threads)).create_infer_request()
            for part, hint in _parts(ov, model, precision)
        ]

    def run(self, batch: NDArray[np.uint8]) -> Selected:
        """See ``Session.run``."""
        inputs: dict[str, Any] = {"images": np.ascontiguousarray(batch)}
        for request in self._requests:
            found = request.infer(inputs, share_inputs=True, share_outputs=True)
            inputs = {name: array for port, array in found.items() for name in port.get_names()}
        return Selected(**{name: inputs[name] for name in OUTPUTS})


def has_bf16(core: Any) -> bool:
    """Return whether this CPU computes in bf16."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def fast_precisions(core: Any) -> list[str]:
    """Return the precisions this CPU has instructions for; without them int8 gains far less."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    int8 = flags & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"}
    return ["fp32", *(["bf16"] if has_bf16(core) else []), *(["int8"] if int8 else [])]


def _settings(hint: str, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Several workers on one machine would all be pinned to its first cores.
        "ENABLE_CPU_PINNING": False,
    }


def _parts(ov: Any, model: Any, precision: PrecisionName) -> list[tuple[Any, str]]:
    """Return the models to run one after the other, each with its precision."""
    outputs = {name: port for port in model.outputs for name in port.get_names()}
    selected = [outputs[name].get_node() for name in OUTPUTS]
    if precision not in ("bf16", "int8"):
        return [(ov.Model(selected, model.get_parameters(), "detector"), "f32")]
    raw = [outputs[name].get_node() for name in RAW]
    network = ov.Model(raw, model.get_parameters(), "network").clone()
    inputs = [_cut(ov, outputs[name], name) for name in RAW]
    return [
        (network, "bf16" if precision == "bf16" else "f32"),
        (ov.Model(selected, inputs, "selection"), "f32"),
    ]


def _cut(ov: Any, port: Any, name: str) -> Any:
    """Everything behind this output gets its value from a new parameter instead."""
    source = port.get_node().input_value(0)
    parameter = ov.opset13.parameter(source.get_partial_shape(), ov.Type.f32, name=name)
    parameter.output(0).get_tensor().set_names({name})
    for reader in source.get_target_inputs():
        reader.replace_source_output(parameter.output(0))
    return parameter

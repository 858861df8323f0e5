"""How the graph of another family is quantised: its blocks by their order, and its inputs.

YOLO-NAS's blocks are known by name; of another graph only the order of its operators is, so it is
cut into a dozen runs of consecutive ones. The last of them, which makes boxes and scores, stays
in float32 from the start, as YOLO-NAS's last convolutions do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import ModelError
from workers.compile.quantize import Scheme
from workers.models.families import read_ports
from workers.models.onnx_family import graph_inputs, network_input
from workers.spec import ModelSpec

BLOCKS = 12
_WEIGHED = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def family_scheme(graph: Path, spec: ModelSpec) -> Scheme:
    """The blocks of an ONNX graph, and what to feed it.

    Raises:
        ModelError: it has no operator that could be quantised.
    """
    convention = spec.convention
    names = _weighed_names(graph)
    if convention is None or not names:
        raise ModelError(f"{graph.name} has no convolution or matrix product to quantise")
    ports = read_ports(graph)

    def feed(image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        pixels = network_input(image[None], spec.preprocessing)
        if ports.batch not in (None, 1):
            pixels = np.repeat(pixels, ports.batch or 1, axis=0)
        return graph_inputs(pixels, ports, convention, spec.preprocessing)

    parts = np.array_split(np.array(names), min(BLOCKS, len(names)))
    groups = {f"block {k}": _pattern(part.tolist()) for k, part in enumerate(parts, 1)}
    return Scheme(groups, (list(groups)[-1],), feed)


def _weighed_names(graph: Path) -> list[str]:
    import onnx

    nodes = onnx.load(str(graph)).graph.node
    return [node.name or node.output[0] for node in nodes if node.op_type in _WEIGHED]


def _pattern(names: list[str]) -> str:
    """These operators; OpenVINO names a convolution's bias as a part of it."""
    return f"^(?:{'|'.join(re.escape(name) for name in names)})(?:/WithoutBiases)?$"

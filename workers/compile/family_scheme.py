"""Quantisation scheme for graphs of other families: blocks by operator order, and inputs.

YOLO-NAS's blocks are known by name; for other graphs only the order of the operators is known, so
they are split into a dozen runs of consecutive operators. Operators without a successor, which
produce boxes and scores, stay in float32 from the start, as YOLO-NAS's last convolutions do. So do
sigmoids and products: SiLU, x × sigmoid(x), has its minimum near zero, where a convolution's output
in 8 bits of its whole range says little, and its own output is quantised for the next convolution
anyway.
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
from workers.models.onnx_family import PORTS, graph_inputs, network_input, ports_to_json
from workers.spec import ModelSpec

BLOCKS = 12
LAST = "last layers"
_PLAIN = ("Sigmoid", "Mul", "Multiply", "Swish")
_WEIGHED = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def family_scheme(graph: Path, spec: ModelSpec) -> Scheme:
    """Return the blocks of an ONNX graph, and what to feed it.

    Raises:
        ModelError: the graph has no operator that can be quantised.
    """
    convention = spec.convention
    weighed = _weighed(graph)
    if convention is None or not weighed:
        raise ModelError(f"{graph.name} has no convolution or matrix product to quantise")
    ports = read_ports(graph)

    def feed(image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        pixels = network_input(image[None], spec.preprocessing)
        if ports.batch not in (None, 1):
            pixels = np.repeat(pixels, ports.batch or 1, axis=0)
        return graph_inputs(pixels, ports, convention, spec.preprocessing)

    last = [name for name, follows in weighed.items() if not follows]
    rest = [name for name, follows in weighed.items() if follows]
    parts = np.array_split(np.array(rest), min(BLOCKS, len(rest))) if rest else []
    groups = {f"block {k}": _pattern(part.tolist()) for k, part in enumerate(parts, 1)}
    groups[LAST] = _pattern(last)
    return Scheme(groups, (LAST,), feed, {PORTS: ports_to_json(ports)}, _PLAIN)


def _weighed(graph: Path) -> dict[str, bool]:
    """Convolutions and matrix products in the graph's order: whether another one follows it."""
    import onnx

    found: dict[str, bool] = {}
    leading: set[str] = set()  # tensors that lead to one
    for node in reversed(onnx.load(str(graph)).graph.node):  # ONNX keeps nodes sorted
        weighed, leads = node.op_type in _WEIGHED, not leading.isdisjoint(node.output)
        if weighed:
            found[node.name or node.output[0]] = leads
        if weighed or leads:
            leading.update(node.input)
    return dict(reversed(found.items()))


def _pattern(names: list[str]) -> str:
    """These operators; OpenVINO names a convolution's bias as a part of it."""
    return f"^(?:{'|'.join(re.escape(name) for name in names)})(?:/WithoutBiases)?$"

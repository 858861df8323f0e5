"""ONNX graphs in the documented layouts of other families, whose outputs are known.

Each graph adds constants, its canned outputs, to nothing but a zero made of its image input, so
what a detector must give is computed from the constants alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


def write_graph(
    path: Path,
    outputs: Mapping[str, NDArray[Any]],
    *,
    size: Sequence[int | str] = (64, 96),
    batch: int | str = "batch",
    size_input: str | None = None,
    kind: int = TensorProto.FLOAT,
    undefined_above: float | None = None,
) -> Path:
    """Write a graph that gives ``outputs`` (each [N, …]) for every image of a batch.

    The mean of the image's first channel is added times 0, so that a batch of B gives B of them,
    and that what is not finite in the input shows in the output. ``undefined_above``: an image of
    a larger mean gives NaN everywhere, as a graph does that takes the root of a difference.
    """
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2, 3], keepdims=0),
    ]
    constants = [numpy_helper.from_array(np.zeros(1, np.float32), "zero")]
    seen = "mean"
    if undefined_above is not None:
        seen = "root"
        constants.append(numpy_helper.from_array(np.full(1, undefined_above, np.float32), "limit"))
        nodes += [
            helper.make_node("Sub", ["limit", "mean"], ["below"]),
            helper.make_node("Sqrt", ["below"], ["root"]),
        ]
    nodes.append(helper.make_node("Mul", [seen, "zero"], ["nothing"]))
    found = []
    for name, values in outputs.items():
        shape = [-1] + [1] * values.ndim
        constants += [
            numpy_helper.from_array(np.array(shape, np.int64), f"{name}_shape"),
            numpy_helper.from_array(values[None].astype(np.float32), f"{name}_values"),
        ]
        integer = np.issubdtype(values.dtype, np.integer)
        nodes += [
            helper.make_node("Reshape", ["nothing", f"{name}_shape"], [f"{name}_zero"]),
            helper.make_node(
                "Add", [f"{name}_zero", f"{name}_values"], [f"{name}_sum" if integer else name]
            ),
        ]
        if integer:
            nodes.append(helper.make_node("Cast", [f"{name}_sum"], [name], to=TensorProto.INT64))
        out = TensorProto.INT64 if integer else TensorProto.FLOAT
        found.append(helper.make_tensor_value_info(name, out, [batch, *values.shape]))
    inputs = [helper.make_tensor_value_info("images", kind, [batch, 3, *size])]
    if size_input is not None:
        # Boxes in shares of the sides come back in its units, as D-FINE's postprocessor does it.
        inputs.append(helper.make_tensor_value_info(size_input, TensorProto.INT64, [batch, 2]))
        nodes = _scaled_by_size(nodes, constants, size_input)
    graph = helper.make_graph(nodes, "detector", inputs, found, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def _scaled_by_size(nodes: list[Any], constants: list[Any], name: str) -> list[Any]:
    """``boxes`` times (first, second, first, second) of the size input."""
    for node in nodes:
        node.output[:] = ["boxes_shares" if out == "boxes" else out for out in node.output]
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    return [
        *nodes,
        helper.make_node("Cast", [name], ["size_float"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["size_float", "size_float"], ["size_twice"], axis=1),
        helper.make_node("Unsqueeze", ["size_twice", "axis"], ["size_row"]),
        helper.make_node("Mul", ["boxes_shares", "size_row"], ["boxes"]),
    ]

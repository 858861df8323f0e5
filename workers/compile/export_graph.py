"""The network as an ONNX graph: normalisation, DFL statistics and selection of anchors inside."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from workers.detectors.nms import OUTPUTS, RAW
from workers.detectors.selection import ExportedDetector
from workers.yolo_nas.dense import DenseDetector

INPUT = "images"
OPSET = 17


def export_onnx(
    dense: DenseDetector, keep: Sequence[int], classes: int, *, cast_first: bool = False
) -> bytes:
    """Export ``ExportedDetector`` as float32 ONNX with a dynamic batch size.

    Args:
        dense: fused, float32, on the CPU; left as it is.
        keep: ids of the classes that may be detected, of ``classes`` in all.
        cast_first: see ``DenseDetector``.
    """
    plain = _contiguous(dense)
    plain.cast_first = cast_first
    network = ExportedDetector(plain, keep, classes).eval()
    height, width = dense.size
    outputs = (*OUTPUTS, *RAW)
    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tracer is deprecated; shapes traced as constants
        torch.onnx.export(
            network,
            # Two images: a batch of one would be traced as a constant in places.
            (torch.zeros((2, height, width, 3), dtype=torch.uint8),),
            graph,  # type: ignore[arg-type]  # a file object will do
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch"} for name in (INPUT, *outputs)},
        )
    return graph.getvalue()


def _contiguous(dense: DenseDetector) -> DenseDetector:
    """Return a copy in plain memory order: channels_last weights would be exported transposed."""
    plain = copy.deepcopy(dense)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()
    return plain

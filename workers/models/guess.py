"""Guess from an ONNX graph's inputs and outputs which family of detectors it is of."""

from __future__ import annotations

from dataclasses import dataclass

from workers.models.families import FAMILIES, GraphPorts

_BOX, _OBJECTNESS = 4, 1  # columns of a joined output before its classes


@dataclass(frozen=True, slots=True)
class Guess:
    """What a graph looks like.

    Attributes:
        family: one of ``FAMILIES``.
        columns: of class scores; None: the graph does not say.
    """

    family: str
    columns: int | None = None


def guess_family(ports: GraphPorts, name: str) -> Guess | None:
    """Return the family whose graphs have such inputs and outputs; None: no family's have.

    Shapes cannot tell a family's convention from a changed export of it, such as a YOLOX that
    decodes its boxes itself: the result is to be measured.

    Args:
        name: of the file; it alone tells RT-DETR from D-FINE, whose conventions are the same.
    """
    outputs = {port.name.lower(): port for port in ports.outputs}
    if ports.sizes is not None:
        found = "rt-detr" if "rtdetr" in name.lower().replace("-", "") else "d-fine"
        return Guess(found) if outputs.keys() == {"labels", "boxes", "scores"} else None
    if outputs.keys() == {"dets", "labels"}:
        shape = outputs["labels"].shape
        return Guess("rf-detr", shape[2]) if len(shape) == len(outputs["dets"].shape) == 3 else None
    return _yolox(ports)


def _yolox(ports: GraphPorts) -> Guess | None:
    """One row for each cell of the grids, with a box, an objectness and the classes."""
    shape, image = ports.outputs[0].shape, ports.image.shape
    if len(ports.outputs) != 1 or len(shape) != 3 or len(image) != 4:
        return None
    height, width, columns = image[2], image[3], shape[2]
    if height is None or width is None or columns is None:
        return None
    strides = FAMILIES["yolox"].convention.strides
    cells = sum((height // stride) * (width // stride) for stride in strides)
    classes = columns - _BOX - _OBJECTNESS
    return Guess("yolox", classes) if shape[1] == cells and classes > 0 else None

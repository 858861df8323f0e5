"""A graph's family as its shapes and names tell it, and no family where they do not."""

from __future__ import annotations

import pytest

from workers.models.families import GraphPorts, Port
from workers.models.guess import Guess, guess_family

SIZES = Port("orig_target_sizes", "tensor(int64)", (None, 2))
CELLS = 52 * 52 + 26 * 26 + 13 * 13
THREE = {"labels": (None, 300), "boxes": (None, 300, 4), "scores": (None, 300)}


def ports(size: int | None, outputs: dict[str, tuple[int | None, ...]], *more: Port) -> GraphPorts:
    image = Port("images", "tensor(float)", (1, 3, size, size))
    found = tuple(Port(name, "tensor(float)", shape) for name, shape in outputs.items())
    return GraphPorts((image, *more), found)


@pytest.mark.parametrize(
    ("seen", "name", "family"),
    [
        (ports(416, {"output": (1, CELLS, 85)}), "a.onnx", Guess("yolox", 80)),
        (ports(640, THREE, SIZES), "dfine_s.onnx", Guess("d-fine")),
        (ports(640, THREE, SIZES), "RT-DETR-r18.onnx", Guess("rt-detr")),
        (ports(560, {"dets": (1, 300, 4), "labels": (1, 300, 91)}), "a", Guess("rf-detr", 91)),
        (ports(416, {"output": (1, 3 * CELLS, 85)}), "yolov5.onnx", None),
        (ports(416, {"output": (1, 84, CELLS)}), "yolov8.onnx", None),
        (ports(416, {"output": (1, CELLS, 5)}), "a.onnx", None),
        (ports(None, {"output": (1, CELLS, 85)}), "open.onnx", None),
        (ports(640, {"boxes": (1, 300, 4)}, SIZES), "a.onnx", None),
        (ports(224, {"logits": (1, 1000)}), "classifier.onnx", None),
    ],
)
def test_a_family_is_told_by_its_shapes_and_names(
    seen: GraphPorts, name: str, family: Guess | None
) -> None:
    assert guess_family(seen, name) == family

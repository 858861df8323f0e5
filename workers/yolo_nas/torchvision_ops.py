"""Makes ``import torchvision`` work beside a CPU build of torch; does nothing elsewhere.

torchvision's wheel on PyPI is linked against CUDA. Beside a CPU torch its library does not load,
its operators are then unknown, and the import ends in ``operator torchvision::nms does not
exist``. super-gradients imports torchvision, and its ``predict()`` calls ``nms``: both are given
an operator of their own here, where the real one is missing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: list[Any] = []  # torch drops the operators when the Library object goes


def ensure_torchvision() -> None:
    """Import torchvision; where its library does not load, define what is needed to import it.

    Idempotent, but not thread-safe: call it before threads start.
    """
    if not _library and not _real_library_loads():
        _define_operators()
        import torchvision.extension

        # nms refuses to run while this says False.
        torchvision.extension._has_ops = lambda: True
    import torchvision


def _real_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # no torchvision at all: the import itself says so better
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError:
            return False
        return True
    return hasattr(torch.ops.torchvision, "nms")


def _define_operators() -> None:
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    library.impl("nms", _nms, "CPU")
    _library.append(library)


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression as torchvision documents it; indices by falling score."""
    order = torch.sort(scores, descending=True, stable=True).indices
    xyxy = boxes[order].detach().float().numpy()
    alive = np.ones(len(xyxy), dtype=bool)
    for i in range(len(xyxy)):
        if alive[i]:
            alive[i + 1 :] &= ~(_iou_with_rest(xyxy, i) > iou_threshold)
    return order[torch.from_numpy(alive)]


def _iou_with_rest(xyxy: np.ndarray[Any, np.dtype[np.float32]], i: int) -> Any:
    """IoU of box ``i`` with every box after it, float32."""
    one, rest = xyxy[i], xyxy[i + 1 :]
    sides = np.minimum(one[2:], rest[:, 2:]) - np.maximum(one[:2], rest[:, :2])
    overlap = np.clip(sides, 0, None).prod(axis=1)
    areas = (rest[:, 2] - rest[:, 0]) * (rest[:, 3] - rest[:, 1])
    union = (one[2] - one[0]) * (one[3] - one[1]) + areas - overlap
    with np.errstate(invalid="ignore"):
        return overlap / union

"""Whether modern-yolonas can stand in for super-gradients: the figures of docs/super_gradients.md.

    python -m benchmarks.modern_yolonas [--name yolo_nas_s] [--size 320] [--threads 1]

Needs both, as the development extra installs them. Builds the same network with each, loads
super-gradients' state dict into the other with ``strict=True``, and compares boxes and scores,
unfused and fused, and how long a fused image takes. Weights and batch-norm statistics are random:
what is compared is the arithmetic. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from workers.images.preprocessing import Preprocessing
from workers.yolo_nas import modern
from workers.yolo_nas.dense import DenseDetector
from workers.yolo_nas.network import build_network, fuse

CLASSES = 80
_ROUNDS = 5


def randomise(network: nn.Module) -> None:
    """Batch-norm statistics as a trained network has them: not those of a fresh one."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) + 0.5


def apart(a: nn.Module, b: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the largest differences of boxes (pixels) and scores over all anchors."""
    with torch.inference_mode():
        first, second = a(images), b(images)
    return {
        "box_px": float((first[0] - second[0]).abs().max()),
        "score": float((first[1] - second[1]).abs().max()),
    }


def ms_an_image(detector: nn.Module, images: Tensor) -> float:
    """Return the fastest of a few rounds."""
    times = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            detector(images)
            times.append(time.perf_counter() - started)
    return round(1000 * min(times) / len(images), 2)


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--name", default="yolo_nas_s")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    ours = build_network(given.name, None, CLASSES)
    randomise(ours)
    theirs = modern.build(given.name, {}, CLASSES)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    size = (given.size, given.size)
    how = Preprocessing(size=size, resize_to=size)
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    a, b = DenseDetector(ours, how).eval(), DenseDetector(theirs, how).eval()
    found: dict[str, Any] = {
        "network": given.name,
        "size": given.size,
        "unfused": apart(a, b, images),
    }
    fuse(ours, size)
    fuse(theirs, size)
    found["fused"] = apart(a, b, images)
    found["ms_an_image"] = {
        "super-gradients": ms_an_image(a, images),
        "modern": ms_an_image(b, images),
    }
    found["versions"] = {"torch": torch.__version__, "super-gradients": version("super-gradients")}
    with contextlib.suppress(PackageNotFoundError):  # used from a folder
        found["versions"]["modern-yolonas"] = version("modern-yolonas")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

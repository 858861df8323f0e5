"""Small COCO-format sets on disk, for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CATEGORIES = ({"id": 7, "name": "ring"}, {"id": 3, "name": "bar"}, {"id": 90, "name": "blur"})


def write_coco(
    folder: Path,
    sizes: Sequence[tuple[int, int]],
    annotations: Sequence[dict[str, Any]],
    **more: Any,
) -> Path:
    """Grey images of (width, height) named 1.png, 2.png, … with ids from 1; the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes, 1):
        Image.new("RGB", size, (90, 90, 90)).save(folder / f"{number}.png")
    coco = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": w, "height": h}
            for n, (w, h) in enumerate(sizes, 1)
        ],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        "categories": list(CATEGORIES),
        **more,
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(coco))
    return path


def box(image_id: int, category_id: int, *xywh: float, **more: Any) -> dict[str, Any]:
    """One COCO annotation."""
    return {"image_id": image_id, "category_id": category_id, "bbox": list(xywh), **more}


def image_with_patch(
    size: tuple[int, int], xyxy: tuple[int, int, int, int], colour: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: mid grey with one filled rectangle; ``size`` is (width, height)."""
    pixels = np.full((size[1], size[0], 3), 90, np.uint8)
    x1, y1, x2, y2 = xyxy
    pixels[y1:y2, x1:x2] = colour
    return pixels

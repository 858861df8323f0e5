"""Do tiles find in a mosaic what the model finds in its pictures one by one?

Mosaics of 20 pictures each are labelled through the worker's own pipeline three ways: as pictures,
as mosaics in tiles, and as mosaics at the network's size. Boxes of a mosaic are given to the
picture in which their centre lies, so that all three are measured by the same ground truth, and
COCO's limit of 100 boxes holds for a picture. Between pictures lies a gutter of padding, since
objects that the edges of two neighbours cut would look like one.

    python -m benchmarks.tiles --data ../shared/data/bccd --truth test.json \
        --model ../shared/models/bccd_nano.safetensors --arch ../shared/models/bccd_nano_arch.yaml \
        --classes RBC,WBC,Platelets --image-size 320
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.worker import Worker
from pipelines.models.measure import expected_from_truth, mean_ap
from pipelines.truth.matching import iou_matrix
from storage.boxes import clipped
from storage.coco.truth import read_truth
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from storage.runs.annotations import read_rows
from workers.images.preprocessing import Tiles
from workers.models.load import load_detector
from workers.models.resolve import resolve_model
from workers.spec import LabellerOptions, ModelRequest

ACROSS, DOWN = 4, 5
EACH = ACROSS * DOWN
# Between pictures: without it, cells that two pictures' edges cut look like one cell.
GUTTER, PADDING = 64, 114
_SURE = 0.3  # boxes that a person would look at, for duplicates
_SAME = 0.5


def main() -> None:
    args = _arguments()
    truth = read_truth(args.data / args.truth)
    count = len(truth.images) // EACH * EACH
    pictures = [_pixels(args.data / "images" / image.name) for image in truth.images[:count]]
    height, width = pictures[0].shape[:2]
    tiles = Tiles(args.tile or max(width, height), args.overlap)
    expected = expected_from_truth(truth, range(count), args.classes)
    result: dict[str, Any] = {
        "pictures": count, "mosaics": count // EACH,
        "mosaic": [(width + GUTTER) * ACROSS, (height + GUTTER) * DOWN],
        "tile": tiles.size, "overlap": tiles.overlap,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="labelfleet-tiles-") as scratch:
        alone, mosaics = Path(scratch) / "alone", Path(scratch) / "mosaics"
        _write(alone, pictures)
        _write(mosaics, list(_mosaics(pictures)))
        ways = {
            "one by one": (alone, None),
            "tiles": (mosaics, tiles),
            "tiles alone": (mosaics, replace(tiles, whole=False)),
            "whole": (mosaics, None),
        }
        for name, (folder, cut) in ways.items():
            found = _labelled(args, folder, cut, Path(scratch))
            if folder == mosaics:
                result[f"{name}: duplicates"] = sum(map(_duplicates, found))
                found = [cell for one in found for cell in _cells(one, width, height)]
            else:
                result[f"{name}: duplicates"] = sum(map(_duplicates, found))
            result[f"{name}: mAP"] = round(mean_ap(found, expected) / 100, 4)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/")
    parser.add_argument("--truth", required=True, help="COCO file in it")
    parser.add_argument("--model", required=True)
    parser.add_argument("--arch")
    parser.add_argument("--classes", type=lambda text: tuple(text.split(",")), required=True)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--tile", type=int, help="default: the longer side of a picture")
    parser.add_argument("--overlap", type=float, default=0.2)
    return parser.parse_args()


def _pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def _write(folder: Path, pictures: Sequence[NDArray[np.uint8]]) -> None:
    """As PNG, so that a mosaic holds its pictures' own pixels."""
    folder.mkdir()
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{number:04d}.png", compress_level=1)


def _mosaics(pictures: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    for first in range(0, len(pictures), EACH):
        height, width = pictures[first].shape[:2]
        shape = (DOWN * (height + GUTTER), ACROSS * (width + GUTTER), 3)
        mosaic = np.full(shape, PADDING, np.uint8)
        for number, pixels in enumerate(pictures[first : first + EACH]):
            top, left = _corner(number, width, height)
            mosaic[top : top + height, left : left + width] = pixels
        yield mosaic


def _corner(number: int, width: int, height: int) -> tuple[int, int]:
    row, column = divmod(number, ACROSS)
    return row * (height + GUTTER), column * (width + GUTTER)


def _labelled(
    args: argparse.Namespace, folder: Path, tiles: Tiles | None, scratch: Path
) -> list[Detections]:
    """Detections of every image of a folder, by name, clipped to it."""
    size = None if args.image_size is None else (args.image_size, args.image_size)
    request = ModelRequest(
        args.model, arch=args.arch, classes=args.classes, image_size=size, score_floor=0.01
    )
    spec = resolve_model(request, StorageOptions(), device="cpu")
    detector = load_detector(spec, StorageOptions(), threads=2)
    worker = Worker(detector, LabellerOptions(), scratch, tiles=tiles)
    try:
        worker.label(folder)
        store = worker.manifest.store
        keys = [listed.key for listed in store.list("annotations/")]
        rows = [row for key in keys for row in read_rows(store, key)]
        rows.sort(key=lambda row: row.image_id)
    finally:
        worker.close()
    return [
        replace(row.detections, boxes=clipped(row.detections.boxes, row.width, row.height))
        for row in rows
    ]


def _cells(found: Detections, width: int, height: int) -> Iterator[Detections]:
    """Yield a mosaic's detections, picture by picture, each clipped to its own."""
    middle = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    for number in range(EACH):
        top, left = _corner(number, width, height)
        inside = (middle >= (left, top)).all(axis=1)
        inside &= (middle < (left + width, top + height)).all(axis=1)
        own = _picked(found, np.asarray(inside))
        shift = np.array([left, top] * 2, np.float32)
        yield replace(own, boxes=clipped(own.boxes - shift, width, height))


def _picked(found: Detections, which: NDArray[np.bool_]) -> Detections:
    values = {f.name: getattr(found, f.name) for f in fields(Detections)}
    picked: dict[str, Any] = {k: None if v is None else v[which] for k, v in values.items()}
    return Detections(**picked)


def _duplicates(found: Detections) -> int:
    """Pairs of confident boxes of one class that overlap by more than half."""
    sure = _picked(found, found.scores >= _SURE)
    iou = np.triu(iou_matrix(sure.boxes, sure.boxes), 1)
    same = sure.category_ids[:, None] == sure.category_ids[None]
    return int(((iou > _SAME) & same).sum())


if __name__ == "__main__":
    main()

"""Compare ``model.decode: exact`` with ``fast``: mAP, boxes that move, milliseconds an image.

    python -m benchmarks.decode_modes --data FOLDER --checkpoint bccd_nano.safetensors
                                      --arch bccd_nano_arch.yaml [--image-size 320] [--images 200]

``fast`` decodes a JPEG at a half, a quarter or an eighth where the network sees it that small;
``exact`` decodes it whole, as ``predict()`` and the trainer do, so that a JPEG and a PNG of the
same pixels give the same boxes. For each set below FOLDER: mAP where the set has the model's
classes; the boxes of score 0.25 and more that have no counterpart of the same class within 3
pixels in the other mode; and the time of decoding and letterboxing, one thread, the two modes in
turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from pipelines.evaluation.coco_matching import ChunkedMatching, detection_rows, truth_box
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from workers.detectors.protocol import Detector
from workers.images.decode import decode
from workers.images.letterbox import letterbox
from workers.models.load import load_detector
from workers.models.resolve import resolve_model
from workers.spec import ModelRequest
from workers.training.coco_set import TrainingSet, read_training_set

SETS = {
    "bccd": (("test.json", "images"), ("val.json", "images")),
    "coco_ccby": (("instances.json", "images"),),
    "hituav": (("val.json", "images"),),
}
MODES = ("exact", "fast")
SHOWN, MOVED_PX = 0.25, 3.0


def detect(detector: Detector, path: Path, mode: str) -> tuple[Detections, float]:
    """Detections in upright pixels, and the seconds of decoding and letterboxing."""
    data, how = path.read_bytes(), detector.preprocessing
    began_s = time.perf_counter()
    image = decode(data, max_pixels=10**9, enough=how if mode == "fast" else None)
    pixels, back = letterbox(image.pixels, how, size=image.size, factor=image.factor)
    seconds = time.perf_counter() - began_s
    (found,) = detector.detect(pixels[None])
    return back.invert(found), seconds


def moved(exact: Detections, other: Detections) -> tuple[int, int]:
    """(boxes of either that have no counterpart within MOVED_PX in the other, boxes of both)."""
    a, b = exact.scores >= SHOWN, other.scores >= SHOWN
    here, there = exact.boxes[a], other.boxes[b]
    same = exact.category_ids[a][:, None] == other.category_ids[b][None]
    far = (
        np.abs(here[:, None] - there[None]).max(-1, initial=0.0)
        if len(here) and len(there)
        else (np.full((len(here), len(there)), np.inf))
    )
    near = same & (far <= MOVED_PX)
    alone = int((~near.any(1)).sum()) + int((~near.any(0)).sum())
    return alone, len(here) + len(there)


def truths(images: TrainingSet, number: int) -> Iterator[dict[str, object]]:
    """Yield the COCO boxes of one image."""
    image = images.images[number]
    for box, label in zip(image.boxes.tolist(), image.labels.tolist(), strict=True):
        wide, high = box[2] - box[0], box[3] - box[1]
        where = (box[0], box[1], wide, high)
        yield truth_box(label, where, wide * high, ignore=False, number=1)


def compare(detector: Detector, images: TrainingSet, count: int) -> str:
    """One line of results for one part of a set."""
    same_classes = images.classes == detector.classes
    matching = {mode: ChunkedMatching(len(images.classes)) for mode in MODES}
    ms: dict[str, list[float]] = {mode: [] for mode in MODES}
    alone = boxes = smaller = 0
    for number, image in enumerate(images.images[:count]):
        found = {}
        for mode in MODES if number % 2 else MODES[::-1]:
            found[mode], seconds = detect(detector, image.path, mode)
            ms[mode].append(1000 * seconds)
        one, both = moved(found["exact"], found["fast"])
        alone, boxes = alone + one, boxes + both
        data = image.path.read_bytes()
        smaller += decode(data, max_pixels=10**9, enough=detector.preprocessing).factor > 1
        for mode in MODES if same_classes else ():
            rows = detection_rows(1, found[mode], (image.width, image.height))
            matching[mode].add(1, list(truths(images, number)), rows)
    said = [f"{len(ms['exact'])} images, {smaller} decoded smaller by fast"]
    for mode in MODES:
        line = f"{mode}: {np.median(ms[mode]):.2f} ms"
        if same_classes:
            precision, _ = matching[mode].curves()
            values = precision[..., 0]
            line += f", mAP {values[values > -1].mean():.4f}"
        said.append(line)
    return "; ".join([*said, f"{alone} of {boxes} boxes moved by more than {MOVED_PX:g} px"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--arch")
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--images", type=int, default=200, help="of each part of a set, at most")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    request = ModelRequest(
        arguments.checkpoint,
        arch=arguments.arch,
        classes=("RBC", "WBC", "Platelets"),
        image_size=(arguments.image_size, arguments.image_size),
        score_floor=0.01,
    )
    spec = resolve_model(request, StorageOptions(), device="cpu")
    detector = load_detector(spec, StorageOptions(), threads=2)
    for name, parts in SETS.items():
        for instances, images in parts:
            folder = arguments.data / name
            read = read_training_set(folder / instances, folder / images)
            print(f"{name}/{instances}: {compare(detector, read, arguments.images)}", flush=True)


if __name__ == "__main__":
    main()

"""How soon the drift test notices that pictures changed, and how often it is wrong.

    python -m benchmarks.drift MODELS BCCD HITUAV WORK [--json FILE]

MODELS holds bccd_nano.safetensors and its arch file; BCCD and HITUAV hold ``images/``. WORK keeps
the pictures and the labelling runs, each made once. Half of bccd's images is the reference; of the
other half, ``CHANGED`` images are labelled as they are, blurred (Gaussian, sigma 3), as JPEG of
quality 20, and at half brightness; hituav stands for another camera. Each is a real run of the
model at 320 pixels.

- changes: after how many images the alarm comes; the mean over ten orders, and the latest. With
  all statistics, and with those of the boxes alone, without bytes a pixel and pixels.
- two halves: all bccd images, split at random 100 times; the test is asked after every tenth part
  of the second half, and any alarm at any of the ten looks counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.config.run_config import RunConfig
from pipelines.evaluation.drift import DriftTest, read_statistics
from pipelines.evaluation.exchangeability import Floats
from pipelines.labelling.run import label_run
from storage.runs.manifest import Manifest

CLASSES = ("RBC", "WBC", "Platelets")
CHANGED = 120
ORDERS, SHUFFLES, LOOKS = 10, 100, 10
Pixels = NDArray[np.uint8]


def _blurred(pixels: Pixels) -> Pixels:
    return np.asarray(cv2.GaussianBlur(pixels, (0, 0), 3.0), np.uint8)


def _half_bright(pixels: Pixels) -> Pixels:
    return np.asarray(pixels // 2, np.uint8)


CHANGES: dict[str, tuple[Callable[[Pixels], Pixels], int]] = {
    "blur": (_blurred, 95),
    "jpeg 20": (lambda pixels: pixels, 20),
    "half brightness": (_half_bright, 95),
}


def _write(folder: Path, images: list[Path], change: str | None) -> Path:
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for path in images:
        if change is None:
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        edit, quality = CHANGES[change]
        pixels = edit(np.asarray(cv2.imread(str(path)), np.uint8))
        cv2.imwrite(str(folder / path.name), pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return folder


def _labelled(models: Path, images: Path, output: Path) -> Manifest:
    if not (output / "run.json").exists():
        config: dict[str, Any] = {
            "name": output.name,
            "source": {"url": str(images), "shard_size": 64},
            "output": str(output),
            "model": {
                "checkpoint": str(models / "bccd_nano.safetensors"),
                "arch": str(models / "bccd_nano_arch.yaml"),
                "classes": list(CLASSES),
                "image_size": 320,
                "licence": "unstated",
            },
            "workers": {"count": 1},
        }
        label_run(RunConfig.model_validate(config))
    return Manifest.open(str(output))


def _values(run: Manifest) -> tuple[tuple[str, ...], Floats]:
    found = read_statistics(run, CLASSES, names=CLASSES)
    return found.names, found.values


def _of_boxes(names: tuple[str, ...]) -> list[int]:
    """Statistics that the file itself does not tell."""
    return [k for k, name in enumerate(names) if name not in ("bytes a pixel", "pixels")]


def _alarms(names: tuple[str, ...], reference: Floats, new: Floats) -> list[int | None]:
    found = []
    for order in range(ORDERS):
        test = DriftTest(names, reference, seed=order)
        for values in np.random.default_rng(order).permutation(new):
            test.see(values)
        found.append(test.alarm_after)
    return found


def _false_alarms(names: tuple[str, ...], values: Floats) -> int:
    alarms = 0
    for shuffle in range(SHUFFLES):
        mixed = np.random.default_rng(shuffle).permutation(values)
        half = len(mixed) // 2
        test = DriftTest(names, mixed[:half], seed=shuffle)
        looks = []
        for part in np.array_split(mixed[half:], LOOKS):
            for row in part:
                test.see(row)
            looks.append(test.alarm_after is not None)
        alarms += any(looks)
    return alarms


def main() -> None:
    """Label what is not labelled yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("models", "bccd", "hituav", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    images = sorted(p for p in (given.bccd / "images").iterdir() if p.is_file())
    order = np.random.default_rng(0).permutation(len(images))
    first = [images[i] for i in order[: len(images) // 2]]
    second = [images[i] for i in order[len(images) // 2 :]]
    sets: dict[str, tuple[list[Path], str | None]] = {
        "reference": (first, None),
        "as they are": (second, None),
    }
    sets |= {name: (second[:CHANGED], name) for name in CHANGES}
    cameras = sorted(p for p in (given.hituav / "images").rglob("*") if p.is_file())
    sets["another camera"] = (cameras[:: max(1, len(cameras) // CHANGED)][:CHANGED], None)
    values = {}
    for name, (paths, change) in sets.items():
        slug = name.replace(" ", "-")
        folder = _write(given.work / "images" / slug, paths, change)
        names, values[name] = _values(_labelled(given.models, folder, given.work / "runs" / slug))
    result: dict[str, Any] = {"alarm_after": {}}
    for name in [n for n in sets if n != "reference"]:
        for what, used in (("all", range(len(names))), ("boxes alone", _of_boxes(names))):
            at = list(used)
            chosen = tuple(names[k] for k in at)
            found = _alarms(chosen, values["reference"][:, at], values[name][:, at])
            result["alarm_after"][f"{name}, {what}"] = found
            seen = [n for n in found if n is not None]
            mean = f"mean {np.mean(seen):.0f}, latest {max(seen)}" if seen else "none"
            print(f"{name:16} {what:12} alarm in {len(seen)} of {ORDERS} orders: {mean}")
    both = np.concatenate([values["reference"], values["as they are"]])
    result["false_alarms"] = _false_alarms(names, both)
    print(f"two halves       alarms in {result['false_alarms']} of {SHUFFLES} shuffles")
    if given.json:
        given.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

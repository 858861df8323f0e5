"""The weak teachers that routing is measured on: trained, and run over all that they never saw.

    python -m benchmarks.review_teachers DATA OUT [--sets bccd hituav] [--seeds 3]

DATA holds ``bccd`` and ``hituav`` (COCO files and images, see CONTRIBUTING.md). For every set and
seed: 15 (bccd) or 60 (hituav) labelled images drawn from its training split, a compact YOLO-NAS
fine-tuned on them alone from the model that ships with labelfleet (handwritten digits), and two
labelling runs: ``tune`` over the rest of what may be looked at (bccd: train and val, hituav: train)
and ``test`` (bccd test, hituav val), which nothing is tuned on.

    OUT/<set>-<seed>/labelled.json         what the teacher learned from
    OUT/<set>-<seed>/model/                the checkpoint, see docs/training.md
    OUT/<set>-<seed>/{tune,test}.json      ground truth of the two runs
    OUT/<set>-<seed>/{tune,test}/          the two runs

The last step's averaged weights are the teacher: with so few labels there are none to choose by.
What is done already is not done again. A teacher takes four to nine minutes of one core, by how
busy the other one is.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.demo.run import checkpoint_path
from pipelines.labelling.run import label_run
from pipelines.training.config import TrainConfig
from pipelines.training.run import train


@dataclass(frozen=True)
class DataSet:
    """A set, how many images of it the teacher sees, and how it is trained.

    Attributes:
        labelled: images.
        tune, test: COCO files; the labelled images are taken from the first of ``tune``.
        image_size: [height, width] of the network's input.
        steps: of eight images.
        train: further fields of the training config.
    """

    labelled: int
    tune: tuple[str, ...]
    test: str
    image_size: tuple[int, int]
    steps: int
    train: dict[str, Any]


SETS = {
    "bccd": DataSet(
        labelled=15,
        tune=("train.json", "val.json"),
        test="test.json",
        image_size=(256, 320),
        steps=600,
        train={"augment": {"flip_vertical": 0.5, "brightness": 0.1, "contrast": 0.15,
                           "saturation": 0.2}},
    ),
    "hituav": DataSet(
        labelled=60,
        tune=("train.json",),
        test="val.json",
        image_size=(256, 320),
        steps=400,
        train={"ignore_categories": ["DontCare"],
               "augment": {"flip_vertical": 0.5, "scale": [0.8, 1.6], "saturation": 0,
                           "hue_deg": 0}},
    ),
}  # fmt: skip


def make_teacher(name: str, seed: int, data: Path, out: Path) -> None:
    """Draw, train and label; each step is skipped where its result is there."""
    made, folder = SETS[name], data / name
    out.mkdir(parents=True, exist_ok=True)
    splits = [_read(folder / part) for part in made.tune]
    drawn = set(random.Random(seed).sample(sorted(i["id"] for i in splits[0]["images"]),
                                           made.labelled))  # fmt: skip
    _write(out / "labelled.json", [_only(splits[0], drawn)])
    rest = {i["id"] for i in splits[0]["images"]} - drawn
    _write(out / "tune.json", [_only(splits[0], rest), *splits[1:]])
    _write(out / "test.json", [_read(folder / made.test)])
    labelled = {"annotations": out / "labelled.json", "images": folder / "images"}
    fields = {
        "name": f"{name}_teacher_{seed}",
        "output": out / "model",
        "train": labelled,
        "val": labelled,
        "model": {"checkpoint": str(checkpoint_path()), "licence": "Apache-2.0"},
        "image_size": made.image_size,
        "steps": made.steps,
        "warmup_steps": 60,
        "ema_decay": 0.995,
        "eval_every": made.steps,
        "seed": seed,
        "threads": 1,
        **made.train,
    }
    if not (out / "model" / "summary.json").exists():
        train(parse_config(TrainConfig, fields, where=name))
    checkpoint = out / "model" / f"{fields['name']}.safetensors"
    for part in ("tune", "test"):
        _label(name, part, checkpoint, folder / "images", out)


def _label(name: str, part: str, checkpoint: Path, images: Path, out: Path) -> None:
    keys = out / f"{part}.csv"
    listed = sorted(i["file_name"] for i in _read(out / f"{part}.json")["images"])
    keys.write_text("\n".join(["key", *listed]) + "\n")
    fields = {
        "name": f"{name}-{part}",
        "source": {"url": str(images), "keys": str(keys)},
        "output": str(out / part),
        "model": {"checkpoint": str(checkpoint)},
        "workers": {"count": 1},
    }
    print(label_run(parse_config(RunConfig, fields, where=name)))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _only(coco: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    return coco | {
        "images": [i for i in coco["images"] if i["id"] in ids],
        "annotations": [a for a in coco["annotations"] if a["image_id"] in ids],
    }


def _write(path: Path, parts: list[dict[str, Any]]) -> None:
    """One COCO file of several with the same categories; ids are given anew."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for part in parts:
        new = {image["id"]: len(images) + i for i, image in enumerate(part["images"], 1)}
        images += [image | {"id": new[image["id"]]} for image in part["images"]]
        annotations += [a | {"image_id": new[a["image_id"]]} for a in part["annotations"]]
    annotations = [a | {"id": i} for i, a in enumerate(annotations, 1)]
    coco = {"images": images, "annotations": annotations, "categories": parts[0]["categories"]}
    path.write_text(json.dumps(coco))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=sorted(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for seed in range(options.seeds):
        for name in options.sets:
            make_teacher(name, seed, options.data, options.out / f"{name}-{seed}")


if __name__ == "__main__":
    main()

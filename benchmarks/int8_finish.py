"""What a quantization-aware finish recovers of what post-training quantization loses.

    python -m benchmarks.int8_finish SHARED [--steps 150] [--lr 1e-4] [--split val,test]
        [--out runs/benchmarks]

SHARED holds data/bccd and models/bccd_nano.safetensors, the compact model. It is finished on bccd's
train split, and calibrated on images of it; both models are judged against the float32 model that
was there before, on the splits named, with everything in INT8 and with the recipe (the heads' last
convolutions in float32), without returning blocks to float32. Prints points of mAP, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.models.int8 import Judge
from pipelines.models.measure import detect_all, mean_ap
from pipelines.models.requested import model_request
from pipelines.models.sample_images import Inputs, sample
from pipelines.training.config import TrainConfig
from pipelines.training.run import train
from storage.coco.truth import Truth, read_truth
from storage.objects.protocols import StorageOptions
from workers.compile.make_artefact import GRAPH, make_graph
from workers.compile.quantize import RECIPE, Quantiser
from workers.detectors.graph import GraphDetector
from workers.models.load import session_of
from workers.models.resolve import resolve_model
from workers.runtimes.artefacts import Artefact
from workers.spec import ModelSpec

CLASSES = ["RBC", "WBC", "Platelets"]
IMAGES = 100  # to calibrate on
KEPT: dict[str, tuple[str, ...]] = {"everything in INT8": (), "the recipe": RECIPE}


class Model:
    """A checkpoint of the compact architecture, with its graph."""

    def __init__(self, config: RunConfig, work: Path) -> None:
        self.config = config
        spec = resolve_model(model_request(config), StorageOptions(), device="cpu")
        self.spec: ModelSpec = replace(spec, score_floor=0.01)
        self.calibration: Inputs = sample(config, spec.preprocessing, IMAGES)
        plain = replace(self.spec, precision="fp32")
        work.mkdir()
        self.graph = make_graph(
            plain, StorageOptions(), self.calibration.pixels, work, _say
        ).artefact()
        self.quantiser = Quantiser(
            self.graph.files[GRAPH], self.calibration.pixels, work, spec.runtime
        )

    def quantised(self) -> dict[str, Artefact]:
        """Return the model in INT8, by what was left in float32."""
        return {name: self.quantiser.quantise(kept) for name, kept in KEPT.items()}

    def fp32_map(self, judge: Judge) -> float:
        """mAP of the float32 model in points."""
        spec = replace(self.spec, precision="fp32")
        detector = GraphDetector(session_of(self.graph, spec, threads=0), spec)
        return mean_ap(detect_all(detector, judge.inputs), judge.expected)


def config_of(shared: Path, checkpoint: Path, work: Path, runtime: str) -> RunConfig:
    """Return the config of a run over the images to calibrate on."""
    train_truth = read_truth(shared / "data/bccd/train.json")
    keys = work / "train.csv"
    keys.write_text("key\n" + "".join(f"{image.name}\n" for image in train_truth.images))
    fields = {
        "name": "int8-finish",
        "source": {"url": str(shared / "data/bccd/images"), "keys": str(keys)},
        "output": str(work / "run"),
        "model": {
            "checkpoint": str(checkpoint),
            "arch": str(shared / "models/bccd_nano_arch.yaml"),
            "classes": CLASSES,
            "image_size": 320,
            "runtime": runtime,
            "precision": "int8",
        },
    }
    return parse_config(RunConfig, fields, where="int8_finish")


def finished(shared: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Finish the compact model; return the summary of the training."""
    bccd, checkpoint = shared / "data/bccd", str(shared / "models/bccd_nano.safetensors")
    sets = {
        part: {"annotations": str(bccd / f"{part}.json"), "images": str(bccd / "images")}
        for part in ("train", "val")
    }
    fields = {
        "name": "finished",
        "output": str(work / "finished"),
        **sets,
        "model": {"arch": str(shared / "models/bccd_nano_arch.yaml"), "checkpoint": checkpoint},
        "image_size": 320,
        "int8": given.runtime,
        "steps": given.steps,
        "eval_every": given.steps,
        "lr": given.lr,
        "warmup_steps": given.steps // 10,
        "device": "cpu",
    }
    config = parse_config(TrainConfig, fields, where="int8_finish")
    started = time.monotonic()
    summary = train(config)
    return {**summary.to_fields(), "wall_s": round(time.monotonic() - started, 1)}


def united(truths: Sequence[Truth]) -> Truth:
    """Return several files of the same classes as one."""
    first = truths[0]
    return replace(
        first,
        source=" and ".join(Path(one.source).name for one in truths),
        images=tuple(image for one in truths for image in one.images),
        boxes=tuple(boxes for one in truths for boxes in one.boxes),
        regions=tuple(one.regions_of(k) for one in truths for k in range(len(one.images))),
    )


def main() -> None:
    """Finish, quantise, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--split", default="val,test")
    parser.add_argument("--runtime", default="openvino")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args()
    shared: Path = given.shared
    truths = [read_truth(shared / f"data/bccd/{name}.json") for name in given.split.split(",")]
    with tempfile.TemporaryDirectory(prefix="labelfleet-bench-") as folder:
        work = Path(folder)
        checkpoint = shared / "models/bccd_nano.safetensors"
        before = Model(config_of(shared, checkpoint, work, given.runtime), work / "before")
        judge = Judge.by_truth(before.config, before.spec, before.graph, united(truths))
        _say(f"float32: {judge.fp32_map:.2f} on {len(judge.inputs)} images of {judge.against}")
        told = finished(shared, work, given)
        own = Path(told["checkpoint"])
        after = Model(config_of(shared, own, work, given.runtime), work / "after")
        floats = after.fp32_map(judge)
        _say(f"{given.steps} steps in {told['wall_s']} s; finished, in float32: {floats:.2f}")
        rows = {}
        for who, model in (("post-training", before), ("finished", after)):
            for name, artefact in model.quantised().items():
                verdict = judge.verdict(artefact)
                rows[f"{name}, {who}"] = asdict(verdict)
                _say(f"{name:20s} {who:14s} {verdict}")
    given.out.mkdir(parents=True, exist_ok=True)
    found = {
        "fp32_map": judge.fp32_map,
        "finished_fp32_map": floats,
        "images": len(judge.inputs),
        "judged_on": judge.against,
        "runtime": given.runtime,
        "steps": given.steps,
        "lr": given.lr,
        "seconds": told["wall_s"],
        "machine": told["machine"],
        "verdicts": rows,
    }
    (given.out / "int8_finish.json").write_text(json.dumps(found, indent=1) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

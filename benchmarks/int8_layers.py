"""Which blocks of YOLO-NAS hurt under INT8: each alone in INT8, and what the product then does.

    python -m benchmarks.int8_layers SHARED [--images 100] [--out runs/benchmarks]

SHARED holds data/bccd and models/bccd_nano.safetensors, the compact model. Calibrated on images of
bccd's train split; layers are judged on val; test is looked at only for the last table. Prints
points of mAP, writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.models.measure import detect_all, expected_from_truth, mean_ap
from pipelines.models.requested import model_request
from pipelines.models.sample_images import Inputs, measured, sample
from storage.coco.truth import Truth, read_truth
from storage.objects.protocols import StorageOptions
from workers.compile.make_artefact import GRAPH, make_graph
from workers.compile.quantize import GROUPS, RECIPE, Quantiser
from workers.detectors.graph import GraphDetector
from workers.models.load import session_of
from workers.models.resolve import resolve_model
from workers.runtimes.artefacts import Artefact
from workers.spec import ModelSpec

CLASSES = ["RBC", "WBC", "Platelets"]


class Bench:
    """The compact model, its graph, and the three splits."""

    def __init__(self, shared: Path, images: int, work: Path) -> None:
        bccd = shared / "data/bccd"
        keys = work / "train.csv"
        train = read_truth(bccd / "train.json")
        keys.write_text("key\n" + "".join(f"{image.name}\n" for image in train.images))
        self.config = _config(shared, bccd / "images", work, keys)
        request = model_request(self.config)
        spec = resolve_model(request, StorageOptions(), device="cpu")
        self.spec: ModelSpec = replace(spec, score_floor=0.01)
        self.calibration: Inputs = sample(self.config, spec.preprocessing, images)
        made = make_graph(
            replace(self.spec, precision="fp32"),
            StorageOptions(),
            self.calibration.pixels,
            work,
            _say,
        )
        self.graph = made.artefact()
        self.quantiser = Quantiser(made.files[GRAPH], self.calibration.pixels, work, "openvino")
        self._truth = {name: read_truth(bccd / f"{name}.json") for name in ("val", "test")}
        self._inputs = {name: self._measured(truth) for name, truth in self._truth.items()}

    def _measured(self, truth: Truth) -> tuple[Inputs, Any]:
        inputs, indices = measured(self.config, self.spec.preprocessing, truth)
        return inputs, expected_from_truth(truth, indices, self.spec.classes)

    def score(self, artefact: Artefact, split: str) -> float:
        """mAP in points."""
        fp32 = artefact.main == GRAPH
        spec = replace(self.spec, precision="fp32") if fp32 else self.spec
        inputs, expected = self._inputs[split]
        detector = GraphDetector(session_of(artefact, spec, threads=0), spec)
        return mean_ap(detect_all(detector, inputs), expected)


def _config(shared: Path, images: Path, work: Path, keys: Path) -> RunConfig:
    fields = {
        "name": "int8-layers",
        "source": {"url": str(images), "keys": str(keys)},
        "output": str(work / "run"),
        "model": {
            "checkpoint": str(shared / "models/bccd_nano.safetensors"),
            "arch": str(shared / "models/bccd_nano_arch.yaml"),
            "classes": CLASSES,
            "image_size": 320,
            "runtime": "openvino",
            "precision": "int8",
        },
    }
    return parse_config(RunConfig, fields, where="int8_layers")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def alone(bench: Bench, fp32: float) -> dict[str, float]:
    """Points of mAP on val that are lost with only this block in INT8."""
    lost = {}
    for name in GROUPS:
        artefact = bench.quantiser.quantise([other for other in GROUPS if other != name])
        lost[name] = fp32 - bench.score(artefact, "val")
        _say(f"  {name:24s} {lost[name]:+.2f}")
    return lost


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--images", type=int, default=100, help="to calibrate on")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="labelfleet-bench-") as folder:
        bench = Bench(given.shared, given.images, Path(folder))
        fp32 = bench.score(bench.graph, "val")
        _say(f"fp32: {fp32:.2f} on val; points lost with one block in INT8:")
        lost = alone(bench, fp32)
        chosen = {"everything in INT8": (), "the recipe": RECIPE}
        whole: dict[str, dict[str, float]] = {}
        for split in ("val", "test"):
            whole.setdefault("fp32", {})[split] = bench.score(bench.graph, split)
        for name, kept in chosen.items():
            artefact = bench.quantiser.quantise(kept)
            whole[name] = {split: bench.score(artefact, split) for split in ("val", "test")}
        for name, figures in whole.items():
            _say(f"{name:24s} val {figures['val']:.2f}  test {figures['test']:.2f}")
    given.out.mkdir(parents=True, exist_ok=True)
    found = {
        "points_lost_alone": lost,
        "map": whole,
        "recipe": RECIPE,
        "calibration_images": len(bench.calibration),
    }
    (given.out / "int8_layers.json").write_text(json.dumps(found, indent=1) + "\n")
    _plot(lost, given.out / "int8_layers.png")


def _plot(lost: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.barh(list(lost)[::-1], list(lost.values())[::-1], color="#4c78a8")
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_xlabel("points of mAP lost on bccd val with this block alone in INT8")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""What a larger teacher gives a smaller student on bccd with all its labels: test mAP by arm.

    python -m benchmarks.distillation --data DATA/bccd [--seeds 0,1,2] [--steps 1500]

The student (``--student-width`` times the channels of examples/bccd/arch.yaml) learns the same
batches of the same labels in three arms:

- alone: from the labels;
- stored: besides, from the class scores and the spread that the teacher gave each labelled box,
  found once on the images as they are: the best detection of its class at IoU .5 and more;
- teacher: besides, from the teacher itself, which sees every augmented batch.

Without ``--teacher`` one of ``--teacher-width`` is trained first. Results go into
``distillation.json`` as they come, and a stopped arm continues from its state file: the same
command goes on where it was. Each arm is judged by the averaged weights of its last step, so that
no set chooses anything of a student.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from benchmarks.rounds import machine, say
from pipelines.training.config import TrainConfig
from pipelines.training.distillation.start import checked_teacher
from pipelines.training.run import train
from pipelines.training.start import Machine
from pipelines.training.validation import measure
from pipelines.truth.matching import iou_matrix
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from workers.detectors.protocol import Detector
from workers.images.letterbox import letterbox
from workers.images.preprocessing import Preprocessing, ValueRange
from workers.models.load_torch import load_detector
from workers.models.resolve import resolve_model
from workers.runtimes.torch_session import torch_detector
from workers.spec import ModelRequest, ModelSpec
from workers.training.augment import SoftTargets, TrainingSample
from workers.training.batches import BatchSource
from workers.training.coco_set import TrainingSet, read_training_set
from workers.training.distillation.knowledge import (
    DistillWeights,
    Knowledge,
    StoredKnowledge,
    TeacherKnowledge,
)
from workers.training.distillation.teacher import torch_dtype
from workers.training.options import FitOptions
from workers.training.recipe.augmentation import Augmentation
from workers.training.samples import Samples
from workers.training.trainer import StepReport, Trainer
from workers.yolo_nas.dense import DenseDetector
from workers.yolo_nas.network import build_network, fuse

ARCH = Path("examples/bccd/arch.yaml")
ARMS = ("alone", "stored", "teacher")
VARIED: dict[str, Any] = {
    "flip_horizontal": 0.5, "flip_vertical": 0.5, "scale": (0.7, 1.5), "brightness": 0.1,
    "contrast": 0.15, "saturation": 0.2, "hue_deg": 6.0,
}  # fmt: skip
_SAME_BOX = 0.5  # IoU from which on a detection is that of a labelled box
_WIDTHS = ("out_channels", "hidden_channels", "output_channels", "inter_channels")


def widened(node: Any, factor: float) -> Any:
    """Return arch_params with all channels but the image's times ``factor``, at least 4."""
    if isinstance(node, list):
        return [widened(item, factor) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: max(4, round(value * factor)) if key in _WIDTHS else widened(value, factor)
        for key, value in node.items()
    }


@dataclass(frozen=True)
class Taught:
    """A labelled set with what a teacher stored about its boxes."""

    labelled: TrainingSet
    soft: tuple[SoftTargets, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """As of the labels."""
        return self.labelled.classes

    @property
    def official_ids(self) -> tuple[int, ...]:
        """As of the labels."""
        return self.labelled.official_ids

    @property
    def objects(self) -> int:
        """As of the labels."""
        return self.labelled.objects

    @property
    def digest(self) -> str:
        """As of the labels: the order and the augmentation are those of the other arms."""
        return self.labelled.digest

    def __len__(self) -> int:
        return len(self.labelled)

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        """Return one image with its knowledge."""
        sample = self.labelled.sample(index, value_range)
        return TrainingSample(
            sample.pixels, sample.boxes, sample.labels, sample.ignore, sample.weights,
            self.soft[index],
        )  # fmt: skip


def taught(labelled: TrainingSet, detector: Detector) -> Taught:
    """Ask a teacher about every labelled box, once, on the images as they are."""
    how, found = detector.preprocessing, []
    for index in range(len(labelled)):
        sample = labelled.sample(index, how.value_range)
        pixels, back = letterbox(sample.pixels, how)
        seen = back.invert(detector.detect(pixels[None])[0])
        found.append(_matched(sample, seen, len(labelled.classes)))
    known = sum(int(np.isfinite(one.scores[:, 0]).sum()) for one in found)
    say(f"the teacher knows {known} of {labelled.objects} labelled boxes")
    return Taught(labelled, tuple(found))


def _matched(sample: TrainingSample, seen: Detections, classes: int) -> SoftTargets:
    count = len(sample.boxes)
    scores = np.full((count, classes), np.nan, np.float32)
    spread = np.full((count, 4), np.nan, np.float32)
    if len(seen) and count:
        iou = iou_matrix(sample.boxes, seen.boxes)
        iou[sample.labels[:, None] != seen.category_ids[None]] = 0
        for row, best in enumerate(iou.argmax(axis=1)):
            if iou[row, best] >= _SAME_BOX:
                scores[row] = 0
                scores[row, seen.topk_ids[best]] = seen.topk_scores[best]
                if seen.box_std is not None:
                    spread[row] = seen.box_std[best]
    return SoftTargets(scores, spread, np.zeros(count, np.bool_))


class Bench:
    """The arms of all seeds, and what they found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.machine = Machine(options.device, "fp32", options.threads)
        size = options.image_size
        self.how = Preprocessing(size=(size, size), resize_to=(size - 4, size - 4))
        self.path = self.out / "distillation.json"
        self.found: dict[str, Any] = {"arms": {}}
        if self.path.exists():
            self.found = json.loads(self.path.read_text())
        said = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key not in ("data", "out", "seeds", "arms", "threads", "teacher")
        }
        if self.found.setdefault("options", said) != said:
            raise SystemExit(f"{self.path} has other options: {self.found['options']}; use --out")
        self.found["machine"] = machine()

    def set(self, name: str) -> TrainingSet:
        """Return one of bccd's three sets."""
        return read_training_set(
            self.options.data / f"{name}.json", self.options.data / "images",
            checked=self.out / "checked.json",
        )  # fmt: skip

    @cached_property
    def teacher(self) -> str:
        """The teacher's checkpoint, trained here unless it is given."""
        if self.options.teacher is not None:
            return str(self.options.teacher)
        arch = self.out / "teacher_arch.yaml"
        arch.write_text(yaml.safe_dump(self.arch(self.options.teacher_width)))
        parts = {
            name: {"annotations": str(self.options.data / f"{name}.json"),
                   "images": str(self.options.data / "images")}
            for name in ("train", "val")
        }  # fmt: skip
        config = TrainConfig.model_validate(
            {
                "name": "teacher", "output": str(self.out / "teacher"), **parts,
                "model": {"arch": str(arch), "licence": "MIT"},
                "image_size": self.options.image_size, "batch_size": self.options.batch_size,
                "steps": self.options.teacher_steps or self.options.steps,
                "augment": VARIED, "device": self.options.device, "precision": "fp32",
                "threads": self.options.threads,
            }
        )  # fmt: skip
        return train(config).checkpoint

    def arch(self, width: float) -> Any:
        """Return bccd's arch_params at another width."""
        return widened(yaml.safe_load(ARCH.read_text()), width)

    @cached_property
    def teacher_detector(self) -> Detector:
        """The teacher as a labelling run would load it."""
        request = ModelRequest(checkpoint=self.teacher, precision="fp32", score_floor=0.05)
        spec = resolve_model(request, StorageOptions(), device=self.options.device)
        return load_detector(spec, StorageOptions(), threads=self.options.threads)

    def run(self, arms: list[str], seeds: list[int]) -> None:
        """Measure the teacher, then each arm of each seed that is not measured yet."""
        if "teacher" not in self.found:
            self.found["teacher"] = asdict(measure(self.teacher_detector, self.set("test")))
            self.write()
            say(f"the teacher itself: test mAP {self.found['teacher']['map_']:.3f}")
        for seed in seeds:
            for arm in arms:
                name = f"{arm}/{seed}"
                if name not in self.found["arms"]:
                    self.found["arms"][name] = self.arm(arm, seed)
                    self.write()
                say(f"{name}: test mAP {self.found['arms'][name]['map_']:.3f}")
        self.summarise()

    def arm(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one student, or continue it, and measure it."""
        labelled = self.set("train")
        torch.set_num_threads(self.options.threads)
        torch.manual_seed(seed)
        text = json.dumps(self.arch(self.options.student_width))
        network = build_network("yolo_nas_s", text, len(labelled.classes))
        learned: Samples = labelled
        knowledge: Knowledge | None = None
        if arm == "stored":
            learned = taught(labelled, self.teacher_detector)
            knowledge = StoredKnowledge(DistillWeights(self.options.weight, final_share=1.0))
        elif arm == "teacher":
            weights = DistillWeights(self.options.weight)
            teacher = checked_teacher(
                self.teacher, labelled.classes, self.how, network, StorageOptions()
            )
            dtype = torch_dtype(self.machine.precision)
            knowledge = TeacherKnowledge(teacher.to(self.machine.device), weights, dtype)
        trainer = self.trainer(network, f"{arm}_{seed}", knowledge, len(labelled.classes))
        source = BatchSource(
            learned, self.how, Augmentation(**VARIED), self.options.batch_size, seed
        )
        losses = self.found.setdefault("losses", {}).setdefault(f"{arm}/{seed}", [])

        def shown(report: StepReport) -> None:
            if report.step % 50 == 0:
                losses.append((report.step, *map(_rounded, (report.loss, report.distilled))))
                say(f"  {arm}/{seed} step {report.step}: loss {report.loss:.3f}, "
                    f"of which distillation {report.distilled:.3f}")  # fmt: skip

        progress = trainer.run(source.stream, lambda _: 0.0, lambda _: None, shown)
        scores = measure(self.detector(trainer.ema_network, labelled.classes), self.set("test"))
        seconds = round(progress.seconds, 1)
        return {**asdict(scores), "seconds": seconds, "steps": progress.step}

    def trainer(
        self, network: nn.Module, name: str, knowledge: Knowledge | None, classes: int
    ) -> Trainer:
        """Return a trainer that continues from its state file."""
        steps = self.options.steps
        fit = FitOptions(
            steps=steps, lr=2e-3, warmup_steps=steps // 10, eval_every=steps,
            ema_decay=0.998 if steps >= 1000 else 0.99, device=self.options.device,
            save_every_s=60,
        )  # fmt: skip
        state = self.out / f"{name}.pt"
        return Trainer(network, classes, fit, fingerprint=name, state=state, knowledge=knowledge)

    def detector(self, network: nn.Module, classes: tuple[str, ...]) -> Detector:
        """Return the averaged weights as inference runs them."""
        dense = DenseDetector(fuse(copy.deepcopy(network), self.how.size), self.how).eval()
        spec = ModelSpec(
            "", "", "yolo_nas_s", None, classes, tuple(range(len(classes))), self.how,
            "torch", "fp32", self.options.device, 0.01, 0.7, 300,
        )  # fmt: skip
        return torch_detector(dense.to(self.options.device), spec)

    def write(self) -> None:
        """Write what is known so far."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.path)

    def summarise(self) -> None:
        """Print the mean and the range of every arm, and its gain over ``alone`` seed by seed."""
        for arm, by_seed in self._by_arm():
            values = list(by_seed.values())
            line = f"{arm}: test mAP {statistics.mean(values):.3f}"
            line += f" [{min(values):.3f}, {max(values):.3f}] over {len(values)} seeds"
            gains = [
                value - self.found["arms"][f"alone/{seed}"]["map_"]
                for seed, value in by_seed.items()
                if f"alone/{seed}" in self.found["arms"]
            ]
            if arm != "alone" and gains:
                line += f"; over alone {statistics.mean(gains):+.3f}"
                line += f" [{min(gains):+.3f}, {max(gains):+.3f}]"
            say(line)
        say(f"{machine()}; {self.path}")

    def _by_arm(self) -> Iterator[tuple[str, dict[str, float]]]:
        for arm in ARMS:
            found = {
                name.partition("/")[2]: scores["map_"]
                for name, scores in self.found["arms"].items()
                if name.startswith(f"{arm}/")
            }
            if found:
                yield arm, found


def _rounded(value: float) -> float:
    return round(value, 4)


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, required=True, help="folder of bccd")
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks/distillation"))
    made.add_argument("--seeds", default="0", help="comma-separated")
    made.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    made.add_argument("--teacher", type=Path, help="a checkpoint; default: one is trained")
    made.add_argument("--teacher-width", type=float, default=2.0, help="times ARCH's channels")
    made.add_argument("--teacher-steps", type=int, help="default: as the student")
    made.add_argument("--student-width", type=float, default=1.0, help="times ARCH's channels")
    made.add_argument("--steps", type=int, default=1500)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--image-size", type=int, default=320)
    made.add_argument("--weight", type=float, default=1.0, help="of distillation")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--threads", type=int, default=1)
    options = made.parse_args()
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        raise SystemExit(f"unknown arms {sorted(unknown)}; there are {', '.join(ARMS)}")
    Bench(options).run(arms, [int(seed) for seed in options.seeds.split(",")])


if __name__ == "__main__":
    main()

"""What a round is worth: test mAP of a teacher's students by how the pool's labels are used.

    python -m benchmarks.training_arms --data DATA/bccd [--seeds 0,1,2] [--arms …]

A seed draws ``--labelled`` images of train.json; all others (or ``--pool`` of them) are the pool,
whose labels no arm but ``reviewed`` and ``ceiling`` sees. The teacher learns the labelled images
from random weights, or (``--start digits``) from those of the demo's network, which has seen
rendered digits alone. It labels the pool, and thresholds and calibration are fitted on ``--fit``
more labelled images, which no arm learns: of ``--fit-from``, else of train.json. Every other arm
begins with the teacher's weights and takes ``--steps`` steps:

- labelled: the labelled images alone;
- hard: half of the images from the pool, boxes above the fitted threshold, all else background;
- band: besides, undecided boxes are regions to ignore;
- weights: besides, every box weighs its calibrated probability of being right, and the pool is
  silent about classes of which the policy knows too little (``absence_from``), unless
  ``--no-silence``;
- stored: besides, class scores and spread as the teacher's rows hold them (``distill: stored``);
- taught: as ``weights``, and the frozen teacher sees every batch (``distill: teacher``);
- round2: the best of the five above by mAP on the rest of ``--fit-from`` (without it, on the
  images of ``--fit``) labels the pool again, and its student begins with its weights (so it has
  had ``--steps`` more);
- reviewed: as ``weights``, after people (ground truth) answered a fifth of the pool, which
  ``route`` chose;
- ceiling: all images with their true labels.

Everything is the product's own: train, the labelling engine (in this process, without Ray), fit,
route, decide. Results go into ``arms.json`` as they come. A stopped arm continues from its own
state: the same command goes on where it was. Each arm is judged on the test set by the averaged
weights of its last step; nothing is chosen on that set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.distillation import ARCH, VARIED, widened
from benchmarks.rounds import chosen, machine, say, versions
from pipelines.config.run_config import RunConfig
from pipelines.demo.run import checkpoint_path
from pipelines.labelling.open_run import open_run
from pipelines.labelling.work import find_work
from pipelines.labels.decide import decide_run
from pipelines.policy.curves import Wanted
from pipelines.policy.fit import fit_run
from pipelines.policy.policy import Policy
from pipelines.rounds.labelled import keys_file
from pipelines.routing.route import route_run
from pipelines.training.config import DataConfig, TrainConfig
from pipelines.training.run import train
from pipelines.training.validation import measure
from storage.coco.truth import Truth, read_truth
from storage.errors import ConfigError
from storage.labels.versions import LabelVersion
from storage.objects.protocols import StorageOptions
from storage.review.answers import Answer, ReviewedBox, answer_parts, append_answers
from storage.review.queue import ReviewItem, read_queue
from storage.runs.ledger import new_invocation
from storage.runs.manifest import Manifest
from workers.labelling.assemble import open_labeller
from workers.models.load import load_detector
from workers.models.resolve import resolve_model
from workers.spec import ModelRequest, WorkerSpec
from workers.training.coco_set import read_training_set

PSEUDO = ("hard", "band", "weights", "stored", "taught")
ARMS = ("teacher", "labelled", *PSEUDO, "reviewed", "ceiling", "round2")
GAIN, HALF = 0.03, 0.5  # goals: of the best arm over the teacher; of the way to the ceiling


@dataclass(frozen=True)
class Split:
    """COCO files of one seed, all with the images of the same folder."""

    labelled: DataConfig
    pool: DataConfig
    fit: DataConfig
    everything: DataConfig
    test: DataConfig
    rest: DataConfig | None


def split(options: argparse.Namespace, seed: int, folder: Path) -> Split:
    """Draw a seed's labelled images and its pool, and write their files."""
    folder.mkdir(parents=True, exist_ok=True)
    images, rng = options.data / "images", np.random.default_rng(seed)
    ignored = set(options.ignore.split(","))

    def read(name: str) -> dict[str, Any]:
        return without(json.loads((options.data / name).read_text()), ignored)

    coco = read("train.json")
    names = [str(image["file_name"]) for image in coco["images"]]
    drawn = [names[i] for i in rng.permutation(len(names))]
    labelled, rest = drawn[: options.labelled], drawn[options.labelled :]
    checked, fit = coco, rest[: options.fit]
    if options.fit_from is None:
        rest = rest[options.fit :]
    else:
        checked = read(options.fit_from)
        others = sorted(str(image["file_name"]) for image in checked["images"])
        others = [others[i] for i in rng.permutation(len(others))]
        fit = others[: options.fit]
    pool = rest[: options.pool]

    def written(name: str, source: Mapping[str, Any], kept: Sequence[str]) -> DataConfig:
        path = _as_json(folder / f"{name}.json", only(source, set(kept)))
        return DataConfig(annotations=path, images=images)

    return Split(
        written("labelled", coco, labelled),
        written("pool", coco, pool),
        written("fit", checked, fit),
        written("everything", coco, [*labelled, *pool]),
        DataConfig(annotations=_as_json(folder / "test.json", read(options.test)), images=images),
        None if options.fit_from is None else written("rest", checked, others[options.fit :]),
    )


def _as_json(path: Path, fields: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(fields))
    return path


def without(coco: Mapping[str, Any], ignored: set[str]) -> dict[str, Any]:
    """Return a COCO file's fields with the boxes of some categories as regions to ignore."""
    ids = {one["id"] for one in coco["categories"] if one["name"] in ignored}
    boxes = coco["annotations"]
    return {
        **coco,
        "categories": [one for one in coco["categories"] if one["id"] not in ids],
        "annotations": [one for one in boxes if one["category_id"] not in ids],
        "ignore": [
            {"image_id": one["image_id"], "bbox": one["bbox"]}
            for one in boxes
            if one["category_id"] in ids
        ],
    }


def only(coco: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a COCO file's fields narrowed to some of its images."""
    images = [image for image in coco["images"] if str(image["file_name"]) in names]
    ids = {image["id"] for image in images}
    lists = {
        key: [one for one in coco[key] if one["image_id"] in ids]
        for key in ("annotations", "ignore")
    }
    return {**coco, "images": images, **lists}


def labelled_here(config: RunConfig) -> Manifest:
    """Label what is left of a run with the product's engine, in this process instead of on Ray."""
    run = open_run(config, cuda=False, note=lambda _: None)
    work, invocation = find_work(run, config, None), new_invocation()
    if work.total:
        labeller = open_labeller(WorkerSpec(run.model, run.source.url, run.manifest.url))
        try:
            for shard in work.shards:
                labeller.label(shard, f"{invocation}-{shard.shard_id}")
        finally:
            labeller.close()
    return run.manifest


def answered(item: ReviewItem, truth: Truth, number: int) -> Answer:
    """Return the answer of a person who knows the truth about an image and saw no boxes."""
    index = next(i for i, image in enumerate(truth.images) if image.name == item.image_id)
    boxes = [box for box in truth.boxes[index] if not box.ignore]
    return Answer(
        image_id=item.image_id, sha256=item.sha256, task_id=number, annotation_id=number,
        annotator="truth", lead_time_s=None, submitted_at=datetime(2026, 1, 1, tzinfo=UTC),
        skipped=False,
        boxes=tuple(
            ReviewedBox(b.xyxy, truth.categories[b.category_id], "added") for b in boxes
        ),
        deleted=(), model_version="", was_blind=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """A label version of a run over the pool, and what is known about it."""

    run: str
    version: LabelVersion

    def source(self, **more: Any) -> dict[str, Any]:
        """Return it as a source of a training."""
        return {"labels": self.run, "version": self.version.version, **more}


class Seed:
    """All arms of one seed."""

    def __init__(self, options: argparse.Namespace, seed: int, found: dict[str, Any]) -> None:
        self.options, self.seed, self.found = options, seed, found
        self.out = Path(options.out) / f"seed{seed}"
        self.split = split(options, seed, self.out / "split")

    def arm(self, name: str) -> dict[str, Any]:
        """Train one arm, or continue it, and return its figures."""
        if name == "teacher":
            more = {"model": self.begun()} if self.options.start == "digits" else {}
            return self.trained(name, self.split.labelled, steps=self.options.teacher_steps, **more)
        if name == "labelled":
            return self.student(name, self.split.labelled)
        if name == "ceiling":
            return self.student(name, self.split.everything)
        if name == "reviewed":
            return self.student(name, self.mixed(self.reviewed.source()))
        if name == "round2":
            best = self.best()
            labels = self.labels(f"student_{best}", self.checkpoint(best))
            more = {"model": self.model(best)}
            return self.student(name, self.mixed(labels.source()), **more) | {"after": best}
        flags: dict[str, Any] = {
            "weights": name not in ("hard", "band"),
            "ignore_band": name != "hard",
        }
        if name in ("hard", "band"):
            flags["absence_from"] = None  # each class is taught as absent where it is not labelled
        distill: dict[str, Any] | None = None
        if name == "stored":
            distill = {"mode": "stored", "weight": self.options.distill_weight}
        elif name == "taught":
            distill = {"mode": "teacher", "teacher": self.checkpoint("teacher"),
                       "weight": self.options.distill_weight}  # fmt: skip
        return self.student(name, self.mixed(self.first.source(**flags)), distill=distill)

    @property
    def absence_from(self) -> float | None:
        """As a source of a training has it."""
        return None if self.options.no_silence else 0.5

    def best(self) -> str:
        """Return the student that is best on the rest of ``--fit-from``, or on ``--fit``."""
        scores = {
            arm: found.get("rest", found["val"])["map_"]
            for arm in PSEUDO
            if (found := self.found["arms"].get(f"{arm}/{self.seed}")) is not None
        }
        if not scores:
            raise SystemExit(f"round2 needs one of {', '.join(PSEUDO)} first")
        return max(scores, key=scores.__getitem__)

    def mixed(self, labels: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the labelled images beside labels of the pool, as a round has them."""
        share = self.options.truth_share
        truth = self.split.labelled.model_dump(mode="json")
        labels = {"absence_from": self.absence_from, **labels}
        return [{**truth, "share": share}, {**labels, "share": 1 - share}]

    def student(self, name: str, data: Any, **more: Any) -> dict[str, Any]:
        """Train from the teacher's weights."""
        fields = {"model": self.model("teacher"), "steps": self.options.steps, **more}
        return self.trained(name, data, **fields)

    def trained(self, name: str, learned: Any, **more: Any) -> dict[str, Any]:
        """Train with the product, and return what the summary says."""
        options = self.options
        if isinstance(learned, DataConfig):
            learned = learned.model_dump(mode="json")
        arch = self.out / "arch.yaml"
        arch.write_text(yaml.safe_dump(widened(yaml.safe_load(ARCH.read_text()), options.width)))
        fields = {
            "name": name, "output": str(self.out / name), "train": learned,
            "val": self.split.fit.model_dump(mode="json"),
            "test": {"test": self.split.test.model_dump(mode="json")},
            "model": {"arch": str(arch), "licence": "MIT"},
            "image_size": options.image_size, "batch_size": options.batch_size, "lr": options.lr,
            "warmup_steps": max(1, more["steps"] // 10), "eval_every": more["steps"],
            "ema_decay": options.ema_decay, "augment": VARIED, "seed": self.seed,
            "device": "cpu", "precision": "fp32", "threads": options.threads, **more,
        }  # fmt: skip
        cpu_s = time.process_time()
        found = train(TrainConfig.model_validate(fields))
        return {
            **asdict(found.test["test"]), "val": asdict(found.val), **self.chosen_by(name),
            "steps": found.steps,
            "images": found.images, "objects": found.objects,
            "loss": found.history[-1][1], "seconds": found.seconds,
            "cpu_s": round(time.process_time() - cpu_s, 1),
        }  # fmt: skip

    def chosen_by(self, name: str) -> dict[str, Any]:
        """Return an arm's figures on the rest of ``--fit-from``, by which settings are chosen."""
        rest = self.split.rest
        if rest is None:
            return {}
        request = ModelRequest(checkpoint=self.checkpoint(name), precision="fp32", score_floor=0.01)
        near = StorageOptions()
        detector = load_detector(resolve_model(request, near, device="cpu"), near, threads=1)
        return {"rest": asdict(measure(detector, read_training_set(rest.annotations, rest.images)))}

    def begun(self) -> dict[str, Any]:
        """Return the demo's network, which has seen digits alone."""
        return {"checkpoint": str(checkpoint_path()), "licence": "Apache-2.0"}

    def model(self, arm: str) -> dict[str, Any]:
        """Return the weights of another arm to begin with."""
        return {"checkpoint": self.checkpoint(arm), "licence": "MIT"}

    def checkpoint(self, arm: str) -> str:
        """Return the path of an arm's weights."""
        return str(self.out / arm / f"{arm}.safetensors")

    @cached_property
    def first(self) -> Labels:
        """The pool as the teacher labels it."""
        return self.labels("teacher", self.checkpoint("teacher"))

    @cached_property
    def reviewed(self) -> Labels:
        """The teacher's labels after people answered what ``route`` chose of the pool."""
        policy = self.policy("teacher", self.checkpoint("teacher"))
        run = self.run("reviewed_pool", self.checkpoint("teacher"), self.split.pool)
        truth = read_truth(self.split.pool.annotations)
        budget = round(self.options.review_share * len(truth.images))
        route_run(run, budget=f"{budget} images", policy=policy, invocation="review",
                  seed=self.seed)  # fmt: skip
        queue = [item for item in read_queue(run.store) if item.show]
        if not answer_parts(run.store):
            append_answers(run.store, [answered(it, truth, n) for n, it in enumerate(queue, 1)])
        version = decide_run(run, policy)
        self.note("labels of review", {**version.counts, "answered": len(queue)})
        return Labels(run.url, version)

    def labels(self, name: str, checkpoint: str) -> Labels:
        """Label the pool, fit on the images for that, and decide."""
        policy = self.policy(name, checkpoint)
        pool = self.run(f"{name}_pool", checkpoint, self.split.pool)
        version = decide_run(pool, policy)
        self.note(f"labels of {name}", dict(version.counts))
        return Labels(pool.url, version)

    def policy(self, name: str, checkpoint: str) -> Policy:
        """Fit thresholds and calibration; those of the product where nothing can be fitted."""
        run = self.run(f"{name}_fit", checkpoint, self.split.fit)
        truth = read_truth(self.split.fit.annotations)
        try:
            fitted = fit_run(run, truth, Wanted(self.options.precision), allow_missing=True,
                             ignore_area=self.options.ignore_area)  # fmt: skip
        except ConfigError as exc:  # hardly a box is right
            self.note(f"fit of {name}", {"refused": exc.message})
            return Policy()
        kept = ("images", "boxes", "error_before", "error_after", "precision", "recall", "refused",
                "ignored_area")  # fmt: skip
        fields = fitted.to_fields()
        self.note(f"fit of {name}", {
            **{key: fields[key] for key in kept}, "warnings": list(fitted.warnings),
            "thresholds": {one.name: [one.accept, one.reject] for one in fitted.classes},
        })  # fmt: skip
        return fitted.policy

    def run(self, name: str, checkpoint: str, data: DataConfig) -> Manifest:
        """Label the images of a set."""
        keys = keys_file(data, self.out / "split" / f"{name}_keys.csv")
        return labelled_here(RunConfig.model_validate({
            "name": name, "output": str(self.out / "runs" / name),
            "source": {"url": str(data.images), "keys": str(keys), "max_absent_keys": 1.0},
            "model": {"checkpoint": checkpoint, "runtime": "torch", "precision": "fp32",
                      "licence": "MIT"},
        }))  # fmt: skip

    def note(self, name: str, fields: Mapping[str, Any]) -> None:
        """Keep what a step found, beside the arms."""
        self.found.setdefault("notes", {})[f"{name}/{self.seed}"] = fields


class Bench:
    """The arms of all seeds, and what they found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path = options.out / "arms.json"
        self.found: dict[str, Any] = {"arms": {}, "notes": {}}
        if self.path.exists():
            self.found = json.loads(self.path.read_text())
        free = ("data", "out", "seeds", "arms", "threads")
        said = {key: value for key, value in vars(options).items() if key not in free}
        if self.found.setdefault("options", said) != said:
            raise SystemExit(f"{self.path} has other options: {self.found['options']}; use --out")
        self.found["machine"], self.found["versions"] = machine(), versions()
        self.options = options

    def run(self, arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Measure each arm of each seed that is not measured yet; one seed after the other."""
        for number in seeds:
            seed = Seed(self.options, number, self.found)
            for arm in arms:
                name = f"{arm}/{number}"
                if name not in self.found["arms"]:
                    self.found["arms"][name] = seed.arm(arm)
                    self.write()
                say(f"{name}: test mAP {self.found['arms'][name]['map_']:.3f}")
        self.found["summary"] = summary(self.found["arms"])
        self.write()
        for line in told(self.found["summary"]):
            say(line)
        say(f"{machine()}; {self.path}")

    def write(self) -> None:
        """Write what is known so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.path)


def summary(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return each arm's mAP by seed with mean and range, its gain over the teacher, and goals.

    The best arm without people is the one with the highest mean over the seeds; the share of the
    way to the ceiling is that of the means.
    """
    by_arm: dict[str, dict[str, float]] = {}
    for name, scores in arms.items():
        arm, _, seed = name.partition("/")
        by_arm.setdefault(arm, {})[seed] = scores["map_"]
    teacher = by_arm.get("teacher", {})
    found = {}
    for arm in (one for one in ARMS if one in by_arm):
        values = by_arm[arm]
        over = [value - teacher[seed] for seed, value in values.items() if seed in teacher]
        found[arm] = {"map_": values, "mean": statistics.mean(values.values()),
                      "low": min(values.values()), "high": max(values.values()),
                      "gain": statistics.mean(over) if over else None,
                      "least_gain": min(over, default=None)}  # fmt: skip
    return {"arms": found, "goals": goals(found)}


def goals(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the best arm without people, what it gains, and how far review gets."""
    alone = [arm for arm in (*PSEUDO, "round2") if arm in found]
    reached: dict[str, Any] = {}
    if "teacher" in found and alone:
        best = max(alone, key=lambda arm: found[arm]["mean"])
        gain, least = found[best]["gain"], found[best]["least_gain"]
        reached["best"] = {"arm": best, "gain": gain, "least_gain": least,
                           "met": gain >= GAIN and least >= 0}  # fmt: skip
    if {"teacher", "reviewed", "ceiling"} <= set(found):
        way = found["ceiling"]["gain"]
        share = found["reviewed"]["gain"] / way if way > 0 else None
        reached["reviewed"] = {"share": share, "met": share is not None and share >= HALF}
    if "labelled" in found and alone:
        best = max(alone, key=lambda arm: found[arm]["mean"])
        reached["over labelled"] = found[best]["mean"] - found["labelled"]["mean"]
    return reached


def told(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the summary's lines."""
    for arm, one in found["arms"].items():
        line = f"{arm:9s} test mAP {one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        if arm != "teacher" and one["gain"] is not None:
            line += f", over the teacher {one['gain']:+.3f}, at least {one['least_gain']:+.3f}"
        yield f"{line}; {len(one['map_'])} seeds"
    for name, goal in found["goals"].items():
        yield f"{name}: {goal}"


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, required=True, help="folder of bccd or hituav")
    made.add_argument("--out", type=Path, default=Path("runs/benchmarks/training_arms"))
    made.add_argument("--seeds", default="0", help="comma-separated")
    made.add_argument("--arms", help="comma-separated; default: all")
    made.add_argument("--labelled", type=int, default=15, help="images that are learned")
    made.add_argument("--pool", type=int, help="images of the pool; default: the rest")
    made.add_argument("--fit", type=int, default=10, help="images to fit thresholds on")
    made.add_argument("--fit-from", help="file they are drawn from; default: train.json")
    made.add_argument("--test", default="test.json", help="file that arms are measured on")
    made.add_argument("--ignore", default="", help="categories to ignore, comma-separated")
    starts = ("random", "digits")
    made.add_argument("--start", choices=starts, default="random", help="weights of the teacher")
    made.add_argument("--width", type=float, default=0.5, help="times ARCH's channels")
    made.add_argument("--image-size", type=int, default=192)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--teacher-steps", type=int, default=400)
    made.add_argument("--steps", type=int, default=200, help="of each student")
    made.add_argument("--lr", type=float, default=2e-3)
    made.add_argument("--ema-decay", type=float, default=0.99)
    made.add_argument("--truth-share", type=float, default=0.5, help="of a student's images")
    made.add_argument("--precision", type=float, default=0.9, help="of accepted boxes, for fit")
    made.add_argument("--ignore-area", type=float, help="as of fit; default: not bounded")
    made.add_argument("--no-silence", action="store_true", help="teach every class's absence")
    made.add_argument("--distill-weight", type=float, default=1.0)
    made.add_argument("--review-share", type=float, default=0.2, help="of the pool")
    made.add_argument("--threads", type=int, default=1)
    return made.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = parsed(given)
    arms = chosen(ARMS, options.arms)
    Bench(options).run(arms, [int(seed) for seed in options.seeds.split(",")])


if __name__ == "__main__":
    main()

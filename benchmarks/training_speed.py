"""Training images/s against super-gradients' own Trainer: same network, data, batch and machine.

    python -m benchmarks.training_speed --data FOLDER [--steps 10] [--rounds 3] [--compile]

FOLDER holds train.json and images, as examples/bccd wants them. Both sides train the network of
examples/bccd/arch.yaml from the same random weights, and read, decode and augment the same files
on the way: flip, scale and position, colour, letterbox to 320 pixels. super-gradients has its
DetectionHSV, DetectionRandomAffine and flips for that, its PPYoloELoss, AdamW and EMA, and its
DataLoader with as many workers as --loaders says. A round is --steps steps of each side in turn,
after one unmeasured round. On a CPU its Trainer has float32 alone; ours is measured in float32, and
in bf16 where `precision: auto` would choose it. --compile adds a side with `compile: true`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from benchmarks.photos import scratch
from benchmarks.rounds import Report, Rounds, plain, say

ARCH = Path(__file__).resolve().parents[1] / "examples" / "bccd" / "arch.yaml"
SIDE = 320
WANTED = 1.5
SCALE = (0.7, 1.5)


def network(classes: int) -> Any:
    """Return the network with weights that are the same every time, as super-gradients has it."""
    import torch
    import yaml

    from workers.yolo_nas.network import build_network

    torch.manual_seed(0)
    return build_network("yolo_nas_s", json.dumps(yaml.safe_load(ARCH.read_text())), classes)


class Ours:
    """Our loop; each call goes on for ``steps`` steps."""

    def __init__(self, options: argparse.Namespace, folder: Path, **more: Any) -> None:
        from workers.images.preprocessing import Preprocessing
        from workers.training.batches import BatchSource
        from workers.training.coco_set import read_training_set
        from workers.training.options import FitOptions
        from workers.training.recipe.augmentation import Augmentation
        from workers.training.trainer import Trainer

        found = read_training_set(options.data / "train.json", options.data / "images")
        how = Preprocessing(size=(SIDE, SIDE), resize_to=(SIDE - 4, SIDE - 4))
        self._source = BatchSource(
            found, how, Augmentation(flip_vertical=0.5, scale=SCALE), options.batch, 0
        )
        self._steps, self._batch = options.steps, options.batch
        self.cpu_s: list[float] = []
        never = 10**9
        fit = FitOptions(steps=never, warmup_steps=10, eval_every=never, save_every_s=1e9, **more)
        self._trainer = Trainer(
            network(len(found.classes)),
            len(found.classes),
            fit,
            fingerprint="",
            state=folder / f"{'-'.join(map(str, more.values()))}.pt",
        )

    def __call__(self) -> float:
        """Return images/s."""
        trainer = self._trainer
        first = trainer.progress.step
        started, cpu = time.perf_counter(), time.process_time()
        for batch in self._source.stream(first, first + self._steps):
            trainer._step(batch)  # what run() does at each step, without its state file
        self.cpu_s.append(time.process_time() - cpu)
        return float(self._steps * self._batch) / (time.perf_counter() - started)


class Theirs:
    """super-gradients' Trainer; each call trains ``steps`` steps, and is timed from the first
    batch it asks for to the end of the last."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder, self._runs = options, folder, 0
        self._dataset = _dataset(options.data)
        self._network = network(len(self._dataset.classes))
        self.cpu_s: list[float] = []

    def __call__(self) -> float:
        """Return images/s."""
        import torch
        from super_gradients.training import Trainer
        from super_gradients.training.losses import PPYoloELoss
        from super_gradients.training.sg_trainer import sg_trainer
        from torchmetrics.classification import MulticlassAccuracy

        options = self._options
        sg_trainer.Accuracy = lambda: MulticlassAccuracy(num_classes=2)  # of an older torchmetrics
        loader = _Timed(_loader(self._dataset, options), options.steps)
        self._runs += 1
        with _quiet():
            Trainer(experiment_name=str(self._runs), ckpt_root_dir=str(self._folder)).train(
                model=self._network,
                training_params={
                    "max_epochs": 1, "lr_mode": "CosineLRScheduler", "initial_lr": 1e-3,
                    "optimizer": "AdamW", "optimizer_params": {"weight_decay": 1e-4},
                    "zero_weight_decay_on_bias_and_bn": True, "ema": True,
                    "ema_params": {"decay": 0.998, "decay_type": "threshold"},
                    "loss": PPYoloELoss(
                        num_classes=len(self._dataset.classes), use_static_assigner=False
                    ),
                    "valid_metrics_list": [], "train_metrics_list": [], "metric_to_watch": "loss",
                    "silent_mode": True, "save_model": False, "save_ckpt_epoch_list": [],
                    "run_validation_freq": 10**6, "average_best_models": False,
                    "mixed_precision": torch.cuda.is_available(),
                },
                train_loader=loader,
                valid_loader=_loader(self._dataset, options),  # of its own: it is not timed
            )  # fmt: skip
        self.cpu_s.append(loader.cpu_s)
        return float(options.steps * options.batch) / loader.seconds


class _Timed:
    """A loader of a fixed number of batches, timed from its first request until it is exhausted."""

    def __init__(self, loader: Any, steps: int) -> None:
        self._loader, self._steps = loader, steps
        self.seconds = self.cpu_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        started, cpu = time.perf_counter(), time.process_time()
        batches = iter(self._loader)
        for _ in range(self._steps):
            yield next(batches)
        self.seconds = time.perf_counter() - started
        self.cpu_s = time.process_time() - cpu


def _dataset(data: Path) -> Any:
    from super_gradients.training.datasets.detection_datasets import coco_format_detection
    from super_gradients.training.transforms import transforms as of

    steps = [
        of.DetectionRandomAffine(
            degrees=0.0, translate=0.25, scales=SCALE, shear=0.0, target_size=(SIDE, SIDE),
            filter_box_candidates=True, border_value=114,
        ),
        of.DetectionHSV(prob=1.0, hgain=6, sgain=30, vgain=30),
        of.DetectionHorizontalFlip(prob=0.5),
        of.DetectionVerticalFlip(prob=0.5),
        of.DetectionPaddedRescale(input_dim=(SIDE, SIDE)),
        of.DetectionStandardize(max_value=255.0),
        of.DetectionTargetsFormatTransform(
            input_dim=(SIDE, SIDE), output_format="LABEL_CXCYWH", max_targets=300
        ),
    ]  # fmt: skip
    with _quiet():
        return coco_format_detection.COCOFormatDetectionDataset(
            data_dir=str(data), json_annotation_file="train.json", images_dir="images",
            input_dim=(SIDE, SIDE), transforms=steps, with_crowd=False,
            ignore_empty_annotations=False,
        )  # fmt: skip


def _loader(dataset: Any, options: argparse.Namespace) -> Any:
    """Return a loader of endlessly shuffled images, with super-gradients' own collate function."""
    import torch
    from super_gradients.training.utils.collate_fn import DetectionCollateFN
    from torch.utils.data import DataLoader, RandomSampler

    collate = DetectionCollateFN()

    def contiguous(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Its own images are channels_last in memory, which corrupts it in backward on a CPU."""
        images, targets = collate(samples)
        return images.contiguous(), targets

    draws = options.steps * options.batch
    return DataLoader(
        dataset,
        batch_size=options.batch,
        sampler=RandomSampler(dataset, replacement=True, num_samples=draws),
        num_workers=options.loaders,
        collate_fn=contiguous,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def sides(options: argparse.Namespace, folder: Path) -> dict[str, Ours | Theirs]:
    """Return the sides by name."""
    import torch

    from pipelines.training.start import fast_bf16

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    plain_fit = {"precision": "fp32", "device": device}
    found: dict[str, Ours | Theirs] = {
        "super-gradients": Theirs(options, folder),
        "fp32": Ours(options, folder, **plain_fit),
    }
    if fast_bf16(device):
        found["bf16"] = Ours(options, folder, **{**plain_fit, "precision": "bf16"})
    if options.compile:
        found["fp32 compiled"] = Ours(options, folder, **plain_fit, compile=True)
    return found


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--steps", type=int, default=10, help="of each side in a round")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--loaders", type=int, default=0, help="processes of super-gradients' loader")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--out", type=Path, default=Path("benchmark_results"))
    options = made.parse_args()
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # its Trainer's own snapshots
    from workers.yolo_nas.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    with _quiet():  # whole, as its users import it, and before our loss imports a part of it
        importlib.import_module("super_gradients.training")
    import torch

    torch.set_num_threads(options.threads)
    report = Report("training_speed", "images/s", plain(options))
    with scratch() as name:
        found = sides(options, Path(name))
        say("one round to warm up")
        Rounds().run(found, 1)
        rounds = Rounds()
        rounds.run(found, options.rounds)
    report.values = rounds.values
    # Of the steps alone: without what a Trainer does before its first and after its last.
    rounds.cpu_s = {name: side.cpu_s[1:] for name, side in found.items()}
    report.facts = {"cpu_s_per_step": {
        name: [s / options.steps for s in spent] for name, spent in rounds.cpu_s.items()
    }}  # fmt: skip
    for side in list(found)[1:]:
        ratio = rounds.per_round(lambda row, s=side: row[s] / row["super-gradients"])  # type: ignore[misc]
        report.add(f"{side} ÷ super-gradients", ratio, at_least=WANTED)
        cpu = rounds.per_round(lambda row, s=side: row["super-gradients"] / row[s], cpu=True)  # type: ignore[misc]
        report.add(f"{side} ÷ super-gradients, in CPU time", cpu, at_least=WANTED)
    report.write(options.out)


if __name__ == "__main__":
    main()

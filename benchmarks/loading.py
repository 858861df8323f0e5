"""Does loading keep the model busy, and how many cores does it take?

A COCO set is trained on for some steps four ways: from its files, from a label version over tars on
this disk, and from the same tars in SeaweedFS, image by image and through the cache. Printed are
images that one core decodes and augments, and that one core trains, per second of processor time
(other processes on the machine do not count there), images trained per second, and the share of the
time in which the model did not wait for a batch.

    python -m benchmarks.loading examples/bccd/train.yaml --set train.images=…/images … [--steps 60]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.training.config import TrainConfig, load_train_config
from pipelines.training.sources import read_data
from pipelines.training.start import first_network, fit_options, resolve_machine
from storage.coco.truth import read_truth
from storage.stores.open import open_store
from tests.support.samples.labelled_run import label
from tests.support.samples.synthetic_run import record
from tests.support.samples.tar_samples import tar_of
from workers.training.augment import augment
from workers.training.batches import BatchSource, TrainingBatch
from workers.training.recipe.augmentation import Augmentation
from workers.training.samples import drawn
from workers.training.trainer import Trainer

_IN_A_TAR = 32


@dataclass(frozen=True, slots=True)
class Loading:
    """One source's figures.

    Attributes:
        loaded_a_core: images decoded and augmented per processor second of one thread.
        trained_a_core: images trained per processor second of all threads, less the loading's.
        trained_a_second: images trained per second.
        busy: share of the time in which the model did not wait for a batch.
    """

    source: str
    loaded_a_core: float
    trained_a_core: float
    trained_a_second: float
    busy: float


class _Waits:
    """A stream of batches that notes how long each is waited for."""

    def __init__(self, source: BatchSource, first: int) -> None:
        self._source, self._first = source, first
        self.waited = self.began = self.spent = 0.0

    def stream(self, first: int, end: int) -> Iterator[TrainingBatch]:
        batches = self._source.stream(first, end)
        for step in range(first, end):
            if step == self._first:  # what came before warmed up
                self.waited, self.began, self.spent = 0.0, time.monotonic(), time.process_time()
            asked = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - asked
            yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = load_train_config(args.config, tuple(args.set))
    with tempfile.TemporaryDirectory(prefix="labelfleet-bench-") as folder, ExitStack() as stack:
        found = [
            _measured(name, made, args.steps, args.warmup, Path(folder))
            for name, made in _sources(config, Path(folder), stack)
        ]
    print(f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print("| source | loaded a core, images/s | trained a core | trained | busy |")
    print("|---|---|---|---|---|")
    for one in found:
        print(
            f"| {one.source} | {one.loaded_a_core:.0f} | {one.trained_a_core:.1f} "
            f"| {one.trained_a_second:.1f} | {one.busy:.1%} |"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


def _sources(
    config: TrainConfig, folder: Path, stack: ExitStack
) -> Iterator[tuple[str, TrainConfig]]:
    yield "files", config
    (source,) = config.sources
    assert source.images is not None
    files = sorted(path for path in source.images.iterdir() if path.is_file())
    tars = {
        f"{first:06}.tar": tar_of(*((p.name, p.read_bytes()) for p in files[first:][:_IN_A_TAR]))
        for first in range(0, len(files), _IN_A_TAR)
    }
    yield "tars on disk", _on(config, str(folder / "in"), str(folder / "run"), tars)
    from tests.support.servers.s3 import weed_server

    server = stack.enter_context(weed_server())
    os.environ.update(server.env())
    bucket = server.fresh_bucket()
    made = _on(config, f"s3://{bucket}/in", f"s3://{bucket}/run", tars)
    yield "SeaweedFS, single reads", made.model_copy(update={"cache": None})
    cache = {"dir": str(folder / "cache"), "size": "2GB"}
    yield "SeaweedFS, cached", _changed(made, cache=cache)


def _on(config: TrainConfig, source: str, output: str, tars: dict[str, bytes]) -> TrainConfig:
    """Put the tars there, label them, and return the config with their labels as its data."""
    store = open_store(source)
    for key, body in tars.items():
        store.put(key, body)
    names = list(read_truth(config.val.annotations).categories.values())
    # Any detector will do: loading does not care what the labels are.
    run = label(store, open_store(output), record_=record(names, store.url))
    decide_run(run, Policy(accept=0.1, reject=0.1))
    return _changed(config, train=[{"labels": run.url}])


def _changed(config: TrainConfig, **other: Any) -> TrainConfig:
    return TrainConfig.model_validate(config.model_dump(mode="json") | other)


def _measured(name: str, config: TrainConfig, steps: int, warmup: int, folder: Path) -> Loading:
    made = config.model_copy(update={"steps": warmup + steps, "eval_every": warmup + steps})
    machine = resolve_machine(made)
    torch.set_num_threads(machine.threads)
    data = read_data(made)
    threads = 1 if machine.device == "cpu" else min(8, machine.threads)
    source = BatchSource(
        data.train, made.preprocessing, Augmentation(**_augmentation(made)), made.batch_size,
        made.seed, threads=threads,
    )  # fmt: skip
    waits = _Waits(source, warmup)
    trainer = Trainer(
        first_network(made, data.train.classes),
        len(data.train.classes),
        fit_options(made, machine, len(data.train)),
        fingerprint="loading",
        state=folder / f"{name}.pt",
    )
    trainer.run(waits.stream, lambda _: 0.0, lambda _: None, lambda _: None)
    took, spent = time.monotonic() - waits.began, time.process_time() - waits.spent
    images, rate = steps * made.batch_size, _rate_a_core(source)
    trained = images / (spent - images / rate)
    return Loading(name, rate, trained, images / took, 1 - waits.waited / took)


def _rate_a_core(source: BatchSource, images: int = 200) -> float:
    rng = np.random.default_rng(0)
    began = time.thread_time()
    for number in range(images):
        index = drawn(source.training_set, 0, number)
        sample = source.training_set.sample(index, source.preprocessing.value_range)
        augment(sample, source.preprocessing, source.augmentation, rng)
    return images / (time.thread_time() - began)


def _augmentation(config: TrainConfig) -> dict[str, Any]:
    """The config's own values for what is varied image by image."""
    said = config.augment.model_dump()
    return {field.name: said[field.name] for field in fields(Augmentation) if field.name in said}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.machine()


if __name__ == "__main__":
    main()

"""Entry point of a suite: each data set is trained or taken, labelled and measured, on one Ray.

    <output>/<set>/truth/       its COCO files, without categories that only group others
    <output>/<set>/model/       the training, where there is one
    <output>/<set>/run/         the run over its test images
    <output>/<set>/result.json  written last: the set is done
    <output>/suite.json, suite.md   the table

A data set that fails is told in the table, and the others go on. The same call continues: sets
that are done are not touched, a training goes on from its state, a run from its commits.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines.cluster.ray_cluster import ray_cluster
from pipelines.config.run_config import RunConfig
from pipelines.dispatch.tally import Caller
from pipelines.evaluation.evaluate import evaluate_run
from pipelines.labelling.run import label_run
from pipelines.suite.config import SuiteConfig, SuiteSet
from pipelines.suite.result import SetResult, SuiteSummary, read_result, write_result
from pipelines.suite.splits import Split
from pipelines.suite.view import markdown
from pipelines.training.config import TrainConfig
from pipelines.training.run import train
from storage.coco.truth import read_truth
from storage.errors import ConfigError, Interrupted, LabelfleetError, RayLost
from storage.objects.json_records import json_record
from storage.objects.protocols import SupportsPut
from storage.runs.lock import run_lock
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from workers.checkpoints.cache import fetch_checkpoint, file_sha256
from workers.models.resolve import read_arch

Label = Callable[[RunConfig, Caller], None]
"""Labels the whole source of a run, or raises."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A data set that is ready to be measured: everything that can be wrong was checked."""

    one: SuiteSet
    folder: Path
    truth: dict[str, Split]
    training: TrainConfig | None
    run: RunConfig
    fingerprint: str


def run_suite(
    config: SuiteConfig,
    *,
    address: str | None = None,
    caller: Caller | None = None,
    console: Console | None = None,
    label: Label | None = None,
) -> SuiteSummary:
    """Measure every data set of a suite, or continue.

    Args:
        config: the suite.
        address: a Ray cluster's address; None: RAY_ADDRESS, else one local Ray for all sets.
        caller: gets notes, and may stop it.
        console: where trainings show their progress; None: it is not shown.
        label: labels a run in place of ``label_run`` on Ray.

    Raises:
        ConfigError: the suite, or one of its data sets, cannot be used; nothing was begun.
        Interrupted: stopped on request; the same call continues.
    """
    caller = caller or Caller()
    output = open_store(str(config.output))
    with ExitStack() as stack:
        stack.enter_context(run_lock(output, f"labelfleet suite {config.name}"))
        jobs = [_job(config, one) for one in config.data_sets()]
        found = {job.one.name: read_result(_store(job), job.fingerprint) for job in jobs}
        left = [job for job in jobs if found[job.one.name] is None]
        if left and label is None:
            stack.enter_context(ray_cluster(address))
        label = label or partial(_on_ray, address)
        for number, job in enumerate(left, 1):
            caller.watcher.note(f"{job.one.name}: data set {number} of {len(left)} left")
            found[job.one.name] = _measured(job, label, caller, console)
            _written(config, output, found, number)
        return _written(config, output, found, len(left))


def _written(
    config: SuiteConfig, output: SupportsPut, found: Mapping[str, SetResult | None], new: int
) -> SuiteSummary:
    """Write the table of what is measured so far, and return it."""
    sets = [result for result in found.values() if result is not None]
    summary = SuiteSummary.of(config.name, str(config.output), sets, new)
    output.put("suite.json", json_record(summary.to_fields()))
    output.put("suite.md", markdown(summary).encode())
    return summary


def _on_ray(address: str | None, config: RunConfig, caller: Caller) -> None:
    done = label_run(config, address=address, caller=caller)
    if done.outcome == "stopped":
        raise Interrupted(
            f"stopped ({caller.stopper.reason})",
            hint="what is committed stays; run the same command to continue",
        )
    if done.left or done.quarantined:
        raise ConfigError(
            f"{done.left + done.quarantined} shards of {done.output} could not be labelled",
            hint=f"`{shlex.join(['labelfleet', 'status', done.output])}` says why",
        )


def _job(config: SuiteConfig, one: SuiteSet) -> _Job:
    """Prepare a data set. Raises ConfigError with its name."""
    folder = config.output / one.name
    try:
        splits = one.splits()
        missing = [name for name in ("train", "valid") if name not in splits.parts]
        if config.training is not None and missing:
            raise ConfigError(
                f"it has no {missing[0]} split to train with",
                hint="state `model.checkpoint` in place of `training` to measure a model as it is",
            )
        truth = splits.write(folder / "truth")
        for name in truth:
            read_truth(truth[name].annotations)
        training = None
        if config.training is not None:
            data = {"train": _data(truth["train"]), "val": _data(truth["valid"])}
            training = config.train_config(one, folder / "model", data)
        checkpoint = None if training is None else str(_checkpoint(training))
        run = config.run_config(one, folder / "run", _source(folder, truth["test"]), checkpoint)
        fingerprint = _fingerprint(truth, training, run)
    except LabelfleetError as exc:
        raise ConfigError(f"data set {one.name}: {exc.message}", hint=exc.hint) from exc
    return _Job(one, folder, truth, training, run, fingerprint)


def _data(split: Split) -> dict[str, str]:
    return {"annotations": str(split.annotations), "images": str(split.images)}


def _checkpoint(training: TrainConfig) -> Path:
    return Path(training.output) / f"{training.name}.safetensors"


def _source(folder: Path, test: Split) -> dict[str, Any]:
    """Return the run's source: the images that the test split names, and no others."""
    names = sorted({image.name for image in read_truth(test.annotations).images})
    keys = folder / "truth" / "test.csv"
    rows = ["key", *('"' + name.replace('"', '""') + '"' for name in names)]
    keys.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"url": str(test.images), "kind": "images", "keys": str(keys)}


def _fingerprint(truth: dict[str, Split], training: TrainConfig | None, run: RunConfig) -> str:
    """16 hex digits of what decides the figures: annotations, weights, settings, version.

    Weights count by their bytes: a file may get other ones under the same name. Those that a
    training makes are decided by it, so the ones that it starts from count.
    """
    model, storage = run.model, run.storage.options()
    weights = None
    if training is None:
        weights = file_sha256(fetch_checkpoint(model.checkpoint, storage, sha256=model.sha256))
    fields = {
        "training": None if training is None else training.model_dump(mode="json"),
        "trained from": None if training is None else training.fingerprint(data=False),
        "weights": weights,
        "arch": None if model.arch is None else read_arch(model.arch, storage),
        "model": model.model_dump(mode="json"),
        "max_pixels": run.max_pixels,
        "truth": {
            name: hashlib.sha256(split.annotations.read_bytes()).hexdigest()
            for name, split in truth.items()
        },
        "version": version("labelfleet"),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _store(job: _Job) -> Any:
    return open_store(str(job.folder))


def _measured(job: _Job, label: Label, caller: Caller, console: Console | None) -> SetResult:
    """Train, label and measure one set; its failure is its result."""
    try:
        result = _measure(job, label, caller, console)
    except (Interrupted, RayLost):
        raise  # no data set is to blame
    except LabelfleetError as exc:
        reason = f"{exc.message} ({exc.hint})" if exc.hint else exc.message
        caller.watcher.note(f"{job.one.name} failed: {reason}")
        return SetResult(job.one.name, job.one.domain, job.fingerprint, error=reason)
    write_result(_store(job), result)
    return result


def _measure(job: _Job, label: Label, caller: Caller, console: Console | None) -> SetResult:
    train_seconds, checkpoint = 0.0, str(job.run.model.checkpoint)
    remarks: list[str] = []
    if job.training is not None:
        trained = train(job.training, console=console, stopper=caller.stopper)
        train_seconds = trained.seconds
        remarks += _left_out({name: len(those) for name, those in trained.left_out.items()})
        _release_gpu()
    label(job.run, caller)
    manifest = Manifest.open(str(job.run.output), job.run.storage.options())
    found = evaluate_run(manifest, job.truth["test"].annotations, allow_missing=True)
    remarks += _left_out({"test": found.missing})
    if found.unknown_to_run:
        remarks.append(f"the model does not know {', '.join(found.unknown_to_run)}")
    return SetResult(
        name=job.one.name,
        domain=job.one.domain,
        fingerprint=job.fingerprint,
        images=found.images,
        classes=len(found.classes),
        map_=found.map_,
        map50=found.map50,
        train_seconds=train_seconds,
        label_seconds=_label_seconds(manifest),
        checkpoint=checkpoint,
        remark="; ".join(remarks),
    )


def _left_out(counts: dict[str, int]) -> Iterator[str]:
    return (f"{count} images of {name} left out" for name, count in counts.items() if count)


def _label_seconds(manifest: Manifest) -> float:
    """Seconds that workers spent on the run, all stages, as its footers say."""
    footers = (manifest.footer(shard_id) for shard_id in manifest.committed())
    return sum(sum(footer.seconds.values()) for footer in footers)


def _release_gpu() -> None:
    """Give back what training cached on a GPU: labelling runs in other processes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()

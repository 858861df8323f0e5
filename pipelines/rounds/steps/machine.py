"""The steps that machines take: gate, label, fit; and trainings for the others."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.labelling.run import label_run
from pipelines.models.artefact import with_artefact
from pipelines.models.compile import has_gpu
from pipelines.models.gate_trials import measure_gate
from pipelines.models.requested import requested_model
from pipelines.policy.curves import Wanted
from pipelines.policy.fit import fit_run
from pipelines.policy.policy import POLICY_KEY, Policy
from pipelines.rounds.costs import gpu_seconds
from pipelines.rounds.labelled import digest
from pipelines.rounds.round_config import FitPart
from pipelines.rounds.state import StepRecord
from pipelines.rounds.work import RoundWork
from pipelines.training.config import FREE, DataConfig, TrainConfig
from pipelines.training.run import train
from pipelines.training.summary import TrainSummary
from storage.coco.truth import read_truth
from storage.errors import BelowTheMark, ConfigError, Interrupted
from storage.runs.manifest import Manifest

Fields = dict[str, Any]


# trainings


def training_inputs(work: RoundWork, config: TrainConfig) -> Fields:
    """Return all that decides a training; where and how fast it runs may differ by machine."""
    fields = config.model_dump(mode="json", exclude={"train", "val", *FREE})
    if config.int8 is None:  # records of earlier versions know no such field
        del fields["int8"]
    return {
        "training": fields,
        "truth": digest(work.labelled.train),
        "val": digest(work.labelled.val),
    }


def trained(work: RoundWork, record: StepRecord, config: TrainConfig) -> Fields:
    """Train, put the checkpoint below the output, and return what later steps need of it."""
    summary = train(config, console=work.console, stopper=work.caller.stopper)
    key = f"{record.place}/{Path(summary.checkpoint).name}"
    work.store.put(key, Path(summary.checkpoint))
    checkpoint = work.checkpoint(summary.checkpoint)
    return {
        "model": {"checkpoint": work.url(key)},
        "sha256": summary.sha256,
        "licence": checkpoint.licence,
        "provenance": checkpoint.provenance,
        "trained": True,
        **_told(summary),
    }


def _told(summary: TrainSummary) -> Fields:
    kept = ("parameters", "images", "objects", "steps", "best_step", "history", "seconds")
    fields = summary.to_fields()
    return {"summary": {k: fields[k] for k in (*kept, "val", "machine", "nbytes")}}


# gate


def gate_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the mark, the teacher and the truth."""
    return {
        "min_map": work.config.gate,
        "teacher": work.state.result("teacher")["sha256"],
        "val": digest(work.labelled.val),
    }


def check_teacher(work: RoundWork, record: StepRecord) -> Fields:
    """Measure the teacher on the labelled images set apart. Raises BelowTheMark."""
    val, teacher = work.labelled.val, work.state.result("teacher")
    config = work.measuring(record.place, val, teacher["model"])
    spec = requested_model(config, cuda=config.workers.gpus != 0 and has_gpu())
    spec = with_artefact(config, spec, say=work.note)
    found = measure_gate(config, spec, str(val.annotations), work.config.gate or 0.0, work.note)
    if not found.passed:
        raise BelowTheMark(f"the teacher: {found.verdict}", hint=found.advice)
    return found.to_fields()


# label


def label_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the teacher, the pool, and what decides boxes."""
    run = {k: v for k, v in work.config.run.items() if k not in ("workers", "notify", "attempts")}
    return {
        "teacher": work.state.result("teacher")["sha256"],
        "pool": work.config.pool.model_dump(mode="json"),
        "run": run,
    }


def label_pool(work: RoundWork, record: StepRecord) -> Fields:
    """Label the pool with the teacher."""
    source = work.config.pool.model_dump(mode="json")
    config = work.run_config(record.place, source, work.state.result("teacher")["model"])
    summary = label_run(config, address=work.address, caller=work.caller)
    if summary.outcome == "stopped":
        raise Interrupted(
            f"stopped while labelling the pool, with {summary.left} shards left",
            hint="the same command continues",
        )
    if not summary.ok:
        raise ConfigError(
            f"pool: none of the {summary.images} images at {config.source.url} could be labelled",
            hint=f"`{shlex.join(['labelfleet', 'status', summary.output])}` says why",
        )
    fields = summary.to_fields()
    kept = ("images", "ok", "detections", "shards", "quarantined", "images_per_s")
    manifest = Manifest.open(config.output, work.options)
    return {
        "run": config.output,
        "licence": manifest.record.identity.licence,
        "gpu_seconds": gpu_seconds(manifest),
        **{key: fields[key] for key in kept},
    }


# fit


def fit_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the teacher, the truth, and what the thresholds are for."""
    return {
        "teacher": work.state.result("teacher")["sha256"],
        "val": digest(work.labelled.val),
        "fit": fit_fields(work.config.fit),
        "label": work.state.result("label")["run"],
    }


def fit_fields(part: FitPart) -> Fields:
    """Return what decides thresholds; unset fields of later versions leave older records valid."""
    fields = part.model_dump(mode="json", exclude={"guarantee", "confidence"})
    if part.ignore_area is None:
        del fields["ignore_area"]
    return fields


def fit_thresholds(work: RoundWork, record: StepRecord) -> Fields:
    """Label the images set apart, fit on their truth, and leave the policy with the pool's run."""
    val, part = work.labelled.val, work.config.fit
    measured = _like_the_pool(work, f"{record.place}/val", val)
    truth = read_truth(val.annotations)
    wanted = Wanted(part.precision, part.lost)
    found = fit_run(measured, truth, wanted, allow_missing=True, ignore_area=part.ignore_area)
    if found.refused is not None and not part.force:
        raise ConfigError(
            f"the thresholds that were fitted must not be used: {found.refused}",
            hint="label more images, ask for less `fit.precision`, set `fit.force: true`, or skip "
            "fit and state `policy`",
        )
    pool = Manifest.open(work.state.result("label")["run"], work.options)
    pool.store.put(POLICY_KEY, found.policy.to_yaml().encode())
    kept = ("images", "boxes", "error_before", "error_after", "precision", "recall", "warnings")
    fields = found.to_fields()
    return {
        "policy": found.policy.digest(),
        "gpu_seconds": gpu_seconds(measured),
        **{key: fields[key] for key in kept},
    }


def _like_the_pool(work: RoundWork, place: str, data: DataConfig) -> Manifest:
    """Label a labelled set as the pool was labelled."""
    model = work.state.result("teacher")["model"]
    source = work.measured_on(data, place.replace("/", "_"))
    return labelled_run(work, work.run_config(place, source, model))


def labelled_run(work: RoundWork, config: RunConfig) -> Manifest:
    """Label whatever is left of a small run, and open it. Raises Interrupted."""
    summary = label_run(config, address=work.address, caller=work.caller)
    if summary.outcome == "stopped":
        raise Interrupted("stopped while measuring", hint="the same command continues")
    return Manifest.open(config.output, work.options)


def policy_of(work: RoundWork, pool: Manifest) -> Policy:
    """Return the fitted policy, or the config's where the step fit was skipped."""
    fitted = Policy.of_run(pool.store, pool.url)
    if fitted is not None:
        return fitted
    stated = work.config.policy
    return Policy.load(stated, work.options) if isinstance(stated, str) else (
        Policy.from_config(stated)
    )  # fmt: skip

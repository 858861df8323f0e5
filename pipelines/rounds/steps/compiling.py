"""The step compile: the student for inference, finished for INT8 where that costs too much.

    compile the student ─> INT8 loses more than it may ─> finish it ─> compile that ─> keep or not

The finish is a short training of the student with INT8's rounding simulated. What it made is
quantised and judged as the student was: on the same images, and against the float32 student, so
that what it may have lost in float32 counts as lost.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.models.compile import compile_model, has_gpu
from pipelines.models.int8 import Against
from pipelines.models.requested import requested_model
from pipelines.rounds.round_config import CompilePart, FinishPart
from pipelines.rounds.state import StepRecord
from pipelines.rounds.steps.machine import trained
from pipelines.rounds.steps.student import student_training
from pipelines.rounds.work import RoundWork, merged
from pipelines.training.config import TRAIN_PAGE, TrainConfig
from storage.coco.truth import read_truth
from storage.errors import ArtefactError, ModelError, ObjectNotFound
from workers.compile.quantize import Int8Refused
from workers.spec import RuntimeName

Fields = dict[str, Any]
REFUSED = "post_training.json"  # what INT8 lost without a finish
# Of a student's training, what a finish does without.
_LEFT_OUT = {
    "stages",
    "epochs",
    "distill",
    "multi_scale",
    "compile",
    "early_stop",
    "test",
    "freeze",
}
_SHARE, _LEAST, _MOST = 0.1, 50, 2000  # of the student's steps
_LR_SHARE = 0.05


def compile_inputs(work: RoundWork, record: StepRecord) -> Fields:
    """Return the student and what is asked of its artefact.

    The default finish is left out: it came later than the records of some rounds.
    """
    part = work.config.compile
    fields = None if part is None else part.model_dump(mode="json")
    if fields is not None and part is not None and part.finish == FinishPart():
        del fields["finish"]
    return {"student": work.state.result("student")["sha256"], "compile": fields}


def compile_student(work: RoundWork, record: StepRecord) -> Fields:
    """Compile the student; an INT8 model that loses too much is a result, not an error."""
    part = work.config.compile
    if part is None:
        return {}
    job = _Job.of(work, record, part)
    before = job.refused_before()
    if before is None:
        before = job.compiled(work.state.result("student")["model"])
        if before["refused"] is not None:
            work.put_json(f"{record.place}/{REFUSED}", before)
    if part.finish is None or not may_help(before, part.max_loss):
        return {**before, "finish": None}
    work.note("INT8 loses more than it may: finishing the student for INT8")
    try:
        made = job.finished(part.finish)
    except ModelError as exc:  # the loss became infinite, for one: the student is as it was
        return {**before, "finish": {"kept": False, "refused": exc.message, "measured": None}}
    after = job.compiled(made["model"], job.of_the_student())
    return kept_of(before, after, made)


def int8_of(result: Fields) -> Fields | None:
    """Return what a round's summary says of INT8; None: there is none.

    ``before`` are the figures of post-training quantization, where a finish was tried.
    """
    facts, finish = result.get("facts") or {}, result.get("finish")
    measured = result["measured"] if result.get("refused") else facts.get("measured")
    if measured is None and finish is None:
        return None
    return {"refused": result["refused"], "measured": measured, "finish": finish}


def may_help(before: Fields, max_loss: float) -> bool:
    """Return whether a finish is worth trying: INT8 was refused for what it was seen to lose.

    Where only the interval is too wide, more images help, and a training does not.
    """
    measured = before.get("measured")
    if before["refused"] is None or not measured:
        return False
    too_much = measured["loss"] > max_loss
    return bool(too_much or measured["agreement"] < measured["min_agreement"])


def kept_of(before: Fields, after: Fields, made: Fields) -> Fields:
    """Return the result: the finished model if it passes, else the refusal; both are told.

    Args:
        before: the result without a finish, which was refused.
        after: the result with the finished weights.
        made: what the training left.
    """
    passed = after["refused"] is None
    measured = after["facts"]["measured"] if passed else after.get("measured")
    finish = {
        "kept": passed,
        "refused": after["refused"],
        "measured": measured,
        "before": before["measured"],
        "model": made["model"],
        "sha256": made["sha256"],
        "steps": made["summary"]["steps"],
        "seconds": made["summary"]["seconds"],
    }
    return {**(after if passed else before), "finish": finish}


@dataclass(frozen=True)
class _Job:
    """A student to compile.

    Attributes:
        source: the images to calibrate on, as `source` of a run.
        against: what INT8's loss is measured against.
    """

    work: RoundWork
    record: StepRecord
    part: CompilePart
    source: Fields
    against: Against

    @staticmethod
    def of(work: RoundWork, record: StepRecord, part: CompilePart) -> _Job:
        val, truth_images = work.labelled.val, work.config.truth.images
        beside = val.images == truth_images  # calibrated on some, measured on others
        source = {"url": str(truth_images)} if beside else work.config.pool.model_dump(mode="json")
        truth = read_truth(val.annotations) if beside and part.precision == "int8" else None
        return _Job(work, record, part, source, Against(truth))

    def refused_before(self) -> Fields | None:
        """Return the refusal that an invocation recorded before it ended in the finish."""
        try:
            found = json.loads(self.work.store.get(f"{self.record.place}/{REFUSED}"))
        except (ObjectNotFound, ValueError):
            return None
        return found if isinstance(found, dict) and "refused" in found else None

    def compiled(self, model: Fields, against: Against | None = None) -> Fields:
        """Return the artefact of a model, or why there is none."""
        config, say = self._config(model), self.work.note
        try:
            made = compile_model(config, cuda=has_gpu(), against=against or self.against, say=say)
        except ArtefactError as exc:
            more: Fields = {}
            if isinstance(exc, Int8Refused):
                more = {"measured": dict(exc.measured), "trials": [asdict(t) for t in exc.trials]}
            return {
                "refused": exc.message, "hint": exc.hint, "precision": self.part.precision, **more
            }  # fmt: skip
        return {"refused": None, **asdict(made)}

    def finished(self, part: FinishPart) -> Fields:
        """Finish the student; return what the training left. Raises ModelError."""
        student = self.work.state.result("student")
        runtime = requested_model(self._config(student["model"]), cuda=has_gpu()).runtime
        training = student_training(self.work, self.record)
        config = finish_config(training, part, student, runtime)
        return trained(self.work, self.record, config)

    def of_the_student(self) -> Against:
        """What a finished model is measured against: its student's float32."""
        model = self.work.state.result("student")["model"]
        reference = requested_model(self._config(model), cuda=has_gpu())
        return Against(self.against.truth, reference)

    def _config(self, model: Fields) -> RunConfig:
        config = self.work.run_config(self.record.place, self.source, model)
        asked = self.part.model_dump(exclude={"finish"})
        return config.model_copy(update={"model": config.model.model_copy(update=asked)})


def finish_config(
    training: TrainConfig, part: FinishPart, student: Fields, runtime: RuntimeName
) -> TrainConfig:
    """Return the training that finishes a student.

    Args:
        training: the student's own; images, batches and augmentation are the same, but for mosaic
            and mixup.
        part: how long and how fast.
        student: the result of its step.
        runtime: that it is compiled for.
    """
    steps = part.steps or finish_steps(student["summary"]["steps"])
    fields = training.model_dump(exclude_unset=True, exclude=_LEFT_OUT)
    own = {
        "name": f"{training.name}-int8",
        "model": {"name": training.model.name, "checkpoint": student["model"]["checkpoint"]},
        "int8": runtime,
        "steps": steps,
        "eval_every": steps,  # no choice is made: the images of val are judged on
        "lr": part.lr or training.lr * _LR_SHARE,
        "warmup_steps": steps // 10,
        "augment": {"mosaic": 0.0, "mixup": 0.0},
    }
    where = "the finish of `compile`"
    return parse_config(TrainConfig, merged(fields, own), where=where, page=TRAIN_PAGE)


def finish_steps(steps: int) -> int:
    """Return how many steps a finish takes by default, after a training of ``steps``."""
    return min(_MOST, max(_LEAST, round(_SHARE * steps)))

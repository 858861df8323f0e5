"""The training loop: PP-YOLOE loss with regions to ignore, AdamW, EMA, warm-up and cosine.

One process and device, or one of a team (workers/training/distributed.py). It knows nothing of
files but its own state file: batches come in, the caller decides what is good (``validate``) and
what to keep.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from storage.errors import ConfigError, ModelError, WorkerError
from storage.objects.os_errors import translating_os_errors
from workers.training.batches import TrainingBatch
from workers.training.distillation.knowledge import Knowledge
from workers.training.distributed import Team, group_size, summed
from workers.training.ema import Ema
from workers.training.loss import RegionLoss
from workers.training.options import FitOptions, learning_rate
from workers.training.recipe.parts import freeze
from workers.training.recipe.update import Update, assigned_score, split
from workers.yolo_nas.lean import lean

_ALONE = Team()


@dataclass(frozen=True, slots=True)
class StepReport:
    """Measurements of one step: the loss and its parts (classification, IoU, DFL), and the rate.

    ``loss`` is the sum of the parts and of ``distilled``, the weighted loss of distillation.
    """

    step: int
    loss: float
    parts: tuple[float, float, float]
    lr: float

    @property
    def distilled(self) -> float:
        """What distillation added to the loss."""
        return self.loss - sum(self.parts)


@dataclass(slots=True)
class TrainingProgress:
    """The progress of a training; stored in the state file.

    Attributes:
        step: steps done; ``seconds`` they and the validations took, stops not counted.
        best_score, best_step: of the best validation.
        history: (step, loss there, validation score).
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float = -1.0
    best_step: int = 0
    history: list[tuple[int, float, float]] = field(default_factory=list)

    def without_gain(self, since: int = 0) -> int:
        """Validations after both the best one and step ``since``."""
        return sum(step > max(self.best_step, since) for step, _, _ in self.history)


@dataclass(frozen=True, slots=True)
class DataMark:
    """Tells changed data from a changed config when a training is continued.

    Attributes:
        config: names everything but the data.
        images: names the images that are drawn from, in their order.
        accepted: continue although the data changed.
    """

    config: str
    images: str
    accepted: bool = False


class Trainer:
    """Fits one network; can be stopped after any step and continued from its state file.

    Args:
        network: from ``yolo_nas.build_network``, unfused.
        fingerprint: names everything that must not change between stop and continue.
        state: the state file; continued from if it exists.
        data: tells changed data from a changed config; None: the fingerprint alone decides.
        team: the processes that train together, each on its part of every batch. All of them read
            the state file, rank 0 writes it; only its ``validate``, ``keep`` and ``stop`` count.
        knowledge: what the network is distilled from, beside its labels; None: nothing.

    Raises:
        ConfigError: the state file is of another training, or of other data.
        WorkerError: the team's processes read different states.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        options: FitOptions,
        *,
        fingerprint: str,
        state: Path,
        data: DataMark | None = None,
        team: Team = _ALONE,
        knowledge: Knowledge | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self.team = team
        self._clock = clock
        self.progress = TrainingProgress()
        self._network = network.to(options.device).train()
        if options.channels_last:
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch
        freeze(self._network, options.freeze)
        self._loss = RegionLoss(classes).to(options.device)
        self._ema = Ema(self._network, options.ema_decay)
        if options.device == "cpu" and options.precision == "fp32":  # where it is measured
            lean(self._network)
        self._update = Update(self._network, options)
        self._fingerprint = fingerprint
        self._state = state
        self._data = data
        self._knowledge = knowledge
        if state.exists():
            self._continue()
        self._agree_on_the_start()
        self._shared = team.share(self._network)
        if options.compile:
            self._shared.compile()  # in place: names in the state dict stay

    @property
    def ema_network(self) -> nn.Module:
        """The averaged weights, in eval mode."""
        return self._ema.network

    def run(
        self,
        batches: Callable[[int, int], Iterable[TrainingBatch]],
        validate: Callable[[nn.Module], float],
        keep: Callable[[nn.Module], None],
        on_step: Callable[[StepReport], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> TrainingProgress:
        """Train to the last step, or until ``stop``; ``progress.step`` tells which.

        Args:
            batches: (first, end) → those steps' batches in order.
            validate: scores the averaged network; higher is better.
            keep: called with the averaged network whenever it is the best so far.
            on_step: called after every step.
            stop: asked after every step; True saves the state and returns.

        Raises:
            ModelError: the loss became NaN or infinite.
        """
        saved_at = self._clock()
        if self.done:  # stopped early before, and only not summed up
            return self.progress
        for batch in batches(self.progress.step, self.options.steps):
            started = self._clock()
            report = self._step(batch)
            on_step(report)
            due = self._due()
            if due:
                self._validate(report, validate, keep)
            self.progress.seconds += self._clock() - started
            stopped = bool(self.team.agree(stop()))
            if due or stopped or self._clock() - saved_at >= self.options.save_every_s:
                self.save()
                saved_at = self._clock()
            if stopped or self.done:
                break
        return self.progress

    @property
    def done(self) -> bool:
        """Whether the last step is done, or validation has not improved for long enough."""
        patience = self.options.early_stop
        idle = self.progress.without_gain(self.options.extended_at)
        early = patience is not None and idle >= patience
        return early or self.progress.step >= self.options.steps

    def _due(self) -> bool:
        step = self.progress.step
        return step % self.options.eval_every == 0 or step == self.options.steps

    def _validate(
        self,
        report: StepReport,
        validate: Callable[[nn.Module], float],
        keep: Callable[[nn.Module], None],
    ) -> None:
        leads = self.team.leads
        score = self.team.agree(validate(self.ema_network) if leads else 0.0)
        self.progress.history.append((report.step, report.loss, score))
        if score >= self.progress.best_score:
            self.progress.best_score, self.progress.best_step = score, report.step
            if leads:
                keep(self.ema_network)

    def _step(self, batch: TrainingBatch) -> StepReport:
        rate = learning_rate(self.progress.step, self.options)
        self._update.begin(rate)
        try:
            parts = self._add_gradients(batch)
        except torch.OutOfMemoryError as exc:
            raise _out_of_memory(exc, len(batch.images) // self.options.accumulate) from exc
        except TorchDynamoException as exc:
            raise ModelError(
                f"the network cannot be compiled: {str(exc).strip().splitlines()[0]:.160}",
                hint="use compile: false, or install a C++ compiler",
            ) from exc
        self.progress.step += 1
        self._ema.update(self._network, self.progress.step)
        cls, iou, dfl, total = parts.tolist()
        return StepReport(self.progress.step, total, (cls, iou, dfl), rate)

    def _add_gradients(self, batch: TrainingBatch) -> Tensor:
        """Change the weights by the gradient of one batch; return the parts of its loss.

        A batch that is accumulated has the loss of the whole: the sum over all its anchors, divided
        by the sum of all target scores. Only BatchNorm sees its parts one by one.
        """
        if self.options.accumulate == 1:
            loss, parts = self._finite_loss(batch)
            self._update.add(loss)
            self._update.apply()
            return parts
        summed, score = torch.zeros(4, device=self.options.device), 0.0
        for part in split(batch, self.options.accumulate):
            loss, parts = self._finite_loss(part)
            of_part = assigned_score(self._loss.assignment.scores)
            divided_by = max(of_part, 1.0)  # as the loss divides
            self._update.add(loss * divided_by)
            summed += parts * divided_by
            score += of_part
        self._update.apply(max(score, 1.0))
        return summed / max(score, 1.0)

    def _finite_loss(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Return the loss and its parts. Raises ModelError: it is NaN or infinite."""
        loss, parts = self._forward(batch)
        if not math.isfinite(parts[-1].item()):  # of all ranks, so that all of them end here
            raise ModelError(
                f"the loss became {parts[-1].item()} at step {self.progress.step + 1}",
                hint="lower lr, raise warmup_steps, or train with precision: fp32",
            )
        return loss, parts

    def _forward(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        options, device = self.options, self.options.device
        images = batch.images.to(device)
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        knowledge, weight = self._knowledge, self._distill_weight()
        # Before the student's graph is in memory: the teacher keeps none of its own.
        seen = knowledge.look(images) if knowledge is not None and weight else None
        lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)
        with torch.autocast(device, lower or torch.bfloat16, enabled=lower is not None):
            _, raw = self._shared(images)
        scores, distances, *anchors = raw
        # The loss in fewer bits would round boxes to several pixels.
        outputs = (scores.float(), distances.float(), *anchors)
        silent = None if batch.silent is None else batch.silent.to(device)
        loss, parts = self._loss(
            outputs,
            batch.targets.to(device),
            batch.ignore.to(device),
            batch.weights.to(device),
            silent,
        )
        if knowledge is not None and weight:
            taught = weight * knowledge.loss(outputs, seen, self._loss.assignment, batch)
            # As RegionLoss does: gradients are averaged over the ranks, parts are of all of them.
            loss, parts = loss + taught * group_size(), parts.clone()
            parts[3] += summed(taught.detach())
        return loss, parts

    def _distill_weight(self) -> float:
        """Return the weight of distillation in this step."""
        if self._knowledge is None:
            return 0.0
        return self._knowledge.weights.at(self.progress.step, self.options.steps)

    def save(self) -> None:
        """Write the state file atomically; rank 0 does.

        Raises:
            StorageError: it cannot be written, such as on a full disk.
        """
        if not self.team.leads:
            return
        _write_state(
            self._state,
            {
                "fingerprint": self._fingerprint,
                **(
                    {}
                    if self._data is None
                    else {"config": self._data.config, "images": self._data.images}
                ),
                "network": self._network.state_dict(),
                "ema": self._ema.network.state_dict(),
                **self._update.state(),
                "progress": asdict(self.progress),
                "steps": self.options.steps,
                "extended_at": self.options.extended_at,
            },
        )

    def _continue(self) -> None:
        saved = torch.load(self._state, map_location=self.options.device, weights_only=True)
        self._refuse_another(saved)
        self._network.load_state_dict(saved["network"])
        self._ema.network.load_state_dict(saved["ema"])
        self._update.load(saved)
        self.progress = TrainingProgress(**saved["progress"])
        if extended_at := saved.get("extended_at", 0):
            self.options = replace(self.options, steps=saved["steps"], extended_at=extended_at)

    def _agree_on_the_start(self) -> None:
        """Raise WorkerError where this rank and rank 0 read states of different steps."""
        mine, first = self.progress.step, int(self.team.agree(self.progress.step))
        if mine != first:
            raise WorkerError(
                f"a worker would go on from step {mine}, the leading one from step {first}: they "
                "read different states",
                hint="the same command continues; all workers need the same output",
            )

    def _refuse_another(self, saved: Mapping[str, object]) -> None:
        """Raise ConfigError if the state belongs to another config or other data."""
        data = self._data
        same = saved["fingerprint"] == self._fingerprint
        if data is not None:
            same = same and saved.get("images", data.images) == data.images
            if not same and saved.get("config") == data.config:
                if data.accepted:
                    return
                raise ConfigError(
                    f"the annotations or images changed since {self._state} was written",
                    hint="--accept-data continues on the data as it is now; or choose another "
                    "output",
                )
        if not same:
            raise ConfigError(
                f"{self._state} is of a training with another config",
                hint="choose another output, or delete the file to start over",
            )


@dataclass(frozen=True, slots=True)
class TrainingLength:
    """Steps of a training by its state file: done, planned, and where it was extended (or 0)."""

    done: int
    total: int
    extended_at: int


def read_length(state: Path) -> TrainingLength:
    """Return how long the training of a state file is."""
    saved = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    done = int(saved["progress"]["step"])
    return TrainingLength(done, int(saved.get("steps", done)), int(saved.get("extended_at", 0)))


def write_extended(source: Path, target: Path, steps: int) -> None:
    """Write a finished training's state as one that goes on to step ``steps``, atomically."""
    saved = torch.load(source, map_location="cpu", weights_only=True)
    saved |= {"steps": steps, "extended_at": saved["progress"]["step"]}
    _write_state(target, saved)


def _write_state(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with translating_os_errors(str(partial)):
        try:
            with partial.open("wb") as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as exc:
            partial.unlink(missing_ok=True)  # on a full disk the room is needed
            # From the end of torch's archive a RuntimeError comes after the file's own error.
            if isinstance(exc, RuntimeError) and isinstance(exc.__context__, OSError):
                raise exc.__context__ from None
            raise
        partial.replace(path)


def _out_of_memory(exc: torch.OutOfMemoryError, images: int) -> ModelError:
    """Return one line: what did not fit, and a batch size that probably does."""
    if images == 1:
        hint = "lower image_size, or train a smaller network"
    else:
        hint = (
            f"try `batch_size: {max(1, images // 2)}`, or a larger `accumulate`, with another "
            "output: it is another training"
        )
    first = str(exc).splitlines()[0]
    return ModelError(
        f"a batch of {images} images does not fit into memory: {first:.160}", hint=hint
    )

"""One training, from config to a self-describing checkpoint: ``labelfleet train``.

Everything below ``output``: ``<name>.safetensors`` (the best averaged weights so far, fp16),
``summary.json`` (when it is done), ``state.pt`` (while it is not; the same command continues),
``last_state.pt`` (when it is done; for ``extend``, which leaves ``extension.json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from pipelines.dispatch.stopping import Stopper
from pipelines.training.config import TrainConfig
from pipelines.training.distillation.start import check_later_teachers, knowledge_of
from pipelines.training.extend import Extension, extend, keep_last_state
from pipelines.training.sources import TrainData, read_data, silent_sources
from pipelines.training.stages import STATE_NAME, MarkedStage, marked_stages, stage_record
from pipelines.training.start import (
    Machine,
    arch_params_of,
    augmentations,
    check_fits,
    first_network,
    fit_options,
    form_of,
    machine_facts,
    provenance_of,
)
from pipelines.training.summary import FILE_NAME, TrainSummary, read_finished
from pipelines.training.team.listeners import listeners_of, listening, tell_step, tell_validated
from pipelines.training.team.mirror import mirrored
from pipelines.training.validation import Scores, measure
from pipelines.training.view import TrainView
from storage.errors import Interrupted
from storage.runs.lock import run_lock
from storage.stores.open import open_store
from workers.checkpoints.description import Description
from workers.checkpoints.file import read_checkpoint, save_checkpoint
from workers.checkpoints.provenance import inherited_licence
from workers.detectors.protocol import Detector
from workers.models.load_torch import load_detector
from workers.models.resolve import resolve_model
from workers.runtimes.torch_session import torch_detector
from workers.spec import ModelRequest, ModelSpec
from workers.training.batches import BatchSource
from workers.training.distributed import Team
from workers.training.int8.form import Form
from workers.training.trainer import DataMark, StepReport, Trainer
from workers.yolo_nas.dense import DenseDetector

_SCORE_FLOOR = 0.01  # mAP counts boxes far below any threshold of use
_FINISHED = "quantization-aware finish; val is measured with INT8's rounding simulated"


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    stopper: Stopper | None = None,
    accept_data: bool = False,
    more_steps: int | None = None,
    address: str | None = None,
) -> TrainSummary:
    """Train, or continue, or return the summary of what is already done.

    Args:
        config: see ``pipelines.training.config``; with ``workers`` the training is theirs.
        console: where progress is shown; None: it is not shown.
        stopper: looked at after every step.
        accept_data: continue a stopped training although its annotations or images changed.
        more_steps: give a finished training this many steps more.
        address: of the Ray cluster of ``workers``; None: RAY_ADDRESS, else a Ray of our own.

    Raises:
        ConfigError: the data cannot be used, the output holds another training, or there is no
            room for the workers.
        SourceError, SourceEmpty: images are missing, or there is nothing to learn.
        ModelError: the loss became NaN or infinite, or the network cannot be built.
        StorageError: the output is in a store, which refuses.
        Interrupted: stopped on request; the same call continues.
        RunLocked: another process trains into this output.
        WorkerLost, RayLost: workers died too often, or the cluster; the same call continues.
    """
    more = None if more_steps is None else Extension(more_steps)
    part = partial(train_part, accept_data=accept_data, more=more)
    stopper = stopper or Stopper()
    if not config.workers.most:
        return part(config, console=console, stopper=stopper)
    from pipelines.training.team.ray_train import train_on_workers  # Ray Train: seconds to import

    with _held(config):
        return train_on_workers(part, config, console=console, stopper=stopper, address=address)


@contextmanager
def _held(config: TrainConfig) -> Iterator[None]:
    """Hold the output. For workers their driver does: a lost one's successor must not wait for it.

    Raises:
        RunLocked: another process trains into it.
    """
    store = open_store(config.remote or str(config.output), config.storage.options())
    with run_lock(store, f"labelfleet train {config.name}"):
        yield


def train_part(
    config: TrainConfig,
    *,
    console: Console | None,
    stopper: Stopper,
    accept_data: bool,
    more: Extension | None,
) -> TrainSummary:
    """Train in this process, alone or as one of a team, with the output where it belongs."""
    team = Team.joined()
    with ExitStack() as stack:
        url, local = config.remote, config
        if url is not None:
            if not config.workers.most:
                stack.enter_context(_held(config))
            folder = stack.enter_context(
                mirrored(open_store(url, config.storage.options()), writes=team.leads)
            )
            local = config.model_copy(update={"output": folder})
        if team.leads:
            fields = config.model_dump(mode="json")
            heard = listeners_of(config.report, fields, local.output)
            stack.enter_context(listening(heard))
        shown = _Shown(console, stopper, local.output, url)
        summary = _train_here(local, shown, more, accept_data=accept_data)
        if url is None:
            return summary
        summary = replace(summary, checkpoint=f"{url}/{Path(summary.checkpoint).name}")
        if team.leads:
            (local.output / FILE_NAME).write_text(json.dumps(summary.to_fields()) + "\n")
        return summary


def _train_here(
    config: TrainConfig, shown: _Shown, more: Extension | None, *, accept_data: bool
) -> TrainSummary:
    """Train with a local output; every process of a team does this at the same time."""
    stages = marked_stages(config)
    with Team.joined().in_turn():
        done = read_finished(config.output, stages[-1].fingerprint)
    if done is not None and more is None:
        return done
    check_fits(stages[0].config, stages[0].machine.device)
    check_later_teachers([stage.config for stage in stages])
    with ExitStack() as stack:
        if shown.url is None and not config.workers.most:
            stack.enter_context(_held(config))
        if more is not None:
            with Team.joined().in_turn():
                done = read_finished(config.output, stages[-1].fingerprint)
                if not extend(config.output, done, more) and done is not None:
                    return done
        return _train_stages(stages, shown, accept_data=accept_data)


def _train_stages(
    stages: Sequence[MarkedStage], shown: _Shown, *, accept_data: bool
) -> TrainSummary:
    *earlier, last = stages
    before: list[Mapping[str, Any]] = []
    for stage in earlier:
        _say_stage(shown.console, stage.name)
        summary = _train_stage(stage, before, shown, accept_data=accept_data)
        before.append(stage_record(stage.name, summary))
    _say_stage(shown.console, last.name)
    return _train_stage(last, before, shown, accept_data=accept_data)


def _say_stage(console: Console | None, name: str) -> None:
    if name and console is not None:
        console.print(f"stage {name}")


@dataclass(frozen=True, slots=True)
class _Shown:
    """Where a training is shown, what is asked whether it should stop, and where it will lie.

    Attributes:
        folder: where it writes; ``url``: where that is copied to, or None.
    """

    console: Console | None
    stopper: Stopper
    folder: Path
    url: str | None

    def lasting(self, config: TrainConfig) -> TrainConfig:
        """Return the config with the place of first weights that outlives this process."""
        first = config.model.checkpoint
        if self.url is None or first is None or not Path(first).is_relative_to(self.folder):
            return config
        place = f"{self.url}/{Path(first).relative_to(self.folder).as_posix()}"
        model = config.model.model_copy(update={"checkpoint": place})
        return config.model_copy(update={"model": model})


def _train_stage(
    stage: MarkedStage, before: Sequence[Mapping[str, Any]], shown: _Shown, *, accept_data: bool
) -> TrainSummary:
    """Train one stage, or return its summary if it is done; ``before`` are records of others."""
    config, machine, team = stage.config, stage.machine, Team.joined()
    with team.in_turn():
        done = read_finished(config.output, stage.fingerprint)
    if done is not None:
        return done
    stored = config.distill is not None and config.distill.mode == "stored"
    with team.in_turn():  # the first leaves for the others what it found out about the images
        data = read_data(config, stored=stored)
    torch.set_num_threads(machine.threads)
    first = first_network(config, data.train.classes)
    knowledge = knowledge_of(config, data.train, first, machine)
    form = form_of(config, first, data.train)
    config.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        form.network,
        len(data.train.classes),
        fit_options(config, machine, len(data.train)),
        fingerprint=stage.fingerprint,
        data=DataMark(stage.config_fingerprint, data.train.digest, accept_data),
        state=config.output / STATE_NAME,
        knowledge=knowledge,
        team=team,
    )
    run = _Run(config, machine, (form, trainer), data, before, shown.lasting(config))
    run.fit(shown.console, shown.stopper)
    summary = team.told(run.finish(stage.fingerprint) if team.leads else None)
    assert summary is not None  # noqa: S101 - the leader's
    return summary


class _Run:
    """A training with its data: fits, validates, keeps and sums up.

    Args:
        learner: the form in which the network learns, and what fits it.
        before: records of earlier stages.
        described: the config as the checkpoint tells it; None: as it is.
    """

    def __init__(
        self,
        config: TrainConfig,
        machine: Machine,
        learner: tuple[Form, Trainer],
        data: TrainData,
        before: Sequence[Mapping[str, Any]] = (),
        described: TrainConfig | None = None,
    ) -> None:
        self._config, self._described = config, described or config
        self._machine = machine
        self._form, self._trainer = learner
        self._data = data
        self._before = [dict(record) for record in before]
        self._best = config.output / f"{config.name}.safetensors"
        self._scores: Scores | None = None

    def fit(self, console: Console | None, stopper: Stopper) -> None:
        """Run to the last step. Raises Interrupted when asked to stop before."""
        trainer, steps = self._trainer, self._trainer.options.steps
        shown = TrainView(console, trainer.progress.step, steps)
        with shown as view, stopper.heeding():
            earlier = sum(int(stage["steps"]) for stage in self._before)

            def validate(network: nn.Module) -> float:
                self._scores = measure(self._averaged(network), self._data.sets["val"])
                view.validated(trainer.progress.step, self._scores)
                tell_validated(earlier + trainer.progress.step, self._scores)
                return self._scores.map_

            def on_step(report: StepReport) -> None:
                view.step(report)
                tell_step(replace(report, step=earlier + report.step))

            team = trainer.team
            batches = partial(self._source().stream, rank=team.rank, world=team.size)
            trainer.run(batches, validate, self._keep, on_step, stopper.asked)
        if not trainer.done:
            raise Interrupted(
                f"stopped at step {trainer.progress.step} of {steps}; everything so far is kept in "
                f"{self._config.output}",
                hint="the same command continues",
            )

    def _source(self) -> BatchSource:
        config = self._config
        people, pseudo = augmentations(config)
        steps = self._trainer.options.steps
        on_cpu = self._machine.device == "cpu"
        return BatchSource(
            self._data.train,
            config.preprocessing,
            people,
            config.batch_size,
            config.seed,
            # On a CPU the training itself wants the cores.
            threads=1 if on_cpu else min(8, self._machine.threads),
            pseudo_augmentation=pseudo,
            mixed_steps=round(steps * (1 - config.augment.close_mosaic)),
            multi_scale=config.multi_scale,
        )

    def _averaged(self, network: nn.Module) -> Detector:
        """Return the averaged weights as inference runs them: fused, fp32."""
        config, classes = self._config, self._data.train.classes
        fused = self._form.deployed(network)
        dense = DenseDetector(fused, config.preprocessing).eval().to(self._machine.device)
        return torch_detector(dense, self._spec(classes))

    def _spec(self, classes: tuple[str, ...]) -> ModelSpec:
        return ModelSpec(
            checkpoint=str(self._best),
            sha256="",
            name=self._config.model.name,
            arch_params=None,
            classes=classes,
            keep=tuple(range(len(classes))),
            preprocessing=self._config.preprocessing,
            runtime="torch",
            precision="fp32",
            device=self._machine.device,
            score_floor=_SCORE_FLOOR,
            nms_iou=0.7,
            max_detections=300,
        )

    def _keep(self, network: nn.Module) -> None:
        """Write the checkpoint; its description says how it was made."""
        config, scores = self._config, self._scores
        told = self._described
        provenance = provenance_of(config, self._data.sources, first_weights=told.model.checkpoint)
        save_checkpoint(
            self._best,
            _halved(self._form.weights(network)),
            Description(
                name=config.model.name,
                arch_params=arch_params_of(config),
                classes=self._data.train.classes,
                preprocessing=config.preprocessing,
                licence=inherited_licence(config.model.licence, provenance),
                provenance=provenance,
                official_ids=self._data.train.official_ids,
                training={
                    "config": told.model_dump(mode="json", exclude={"output", "cache", "storage"}),
                    "step": self._trainer.progress.step,
                    "images": len(self._data.train),
                    "objects": self._data.train.objects,
                    "val": None if scores is None else asdict(scores),
                    **({"sources": list(self._data.sources)} if self._data.sources else {}),
                    **({"stages": self._before} if self._before else {}),
                    **({"int8": _FINISHED} if config.int8 is not None else {}),
                },
            ),
        )

    def finish(self, fingerprint: str) -> TrainSummary:
        """Measure the file that was kept, write summary.json, keep the state for an extension."""
        checkpoint = read_checkpoint(self._best)
        progress, training = self._trainer.progress, self._data.train
        network = self._form.weights(self._trainer.ema_network)
        summary = TrainSummary(
            name=self._config.name,
            checkpoint=str(self._best),
            sha256=checkpoint.sha256,
            nbytes=self._best.stat().st_size,
            parameters=sum(p.numel() for p in network.parameters()),
            classes=training.classes,
            images=len(training),
            objects=training.objects,
            steps=progress.step,
            best_step=progress.best_step,
            val=Scores(**(checkpoint.training or {})["val"]),
            test=self._test(),
            history=progress.history,
            seconds=round(progress.seconds, 1),
            machine=machine_facts(self._machine),
            fingerprint=fingerprint,
            stages=self._before,
            extended_at=self._trainer.options.extended_at,
            left_out={part: dict(s.left_out) for part, s in self._data.sets.items() if s.left_out},
            boxes_dropped={
                part: s.without_area for part, s in self._data.sets.items() if s.without_area
            },
            silent=silent_sources(self._data),
        )
        (self._config.output / FILE_NAME).write_text(json.dumps(summary.to_fields()) + "\n")
        keep_last_state(self._config.output)
        return summary

    def _test(self) -> dict[str, Scores]:
        """Each test set through the checkpoint file, exactly as a labelling run would load it."""
        if not self._config.test:
            return {}
        request = ModelRequest(
            checkpoint=str(self._best), precision="fp32", score_floor=_SCORE_FLOOR
        )
        options = self._config.storage.options()
        spec = resolve_model(request, options, device=self._machine.device)
        detector = load_detector(spec, options, threads=self._machine.threads)
        return {
            name: measure(detector, self._data.sets[f"test {name}"]) for name in self._config.test
        }


def _halved(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights as fp16, half the file; as they are where fp16 cannot hold them."""
    state = network.state_dict()
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    fits = all(bool(v.isfinite().all()) for v in halved.values() if v.is_floating_point())
    return halved if fits else state

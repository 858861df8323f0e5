"""The metrics that a training exports to Prometheus through Ray, as a run does."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.dispatch.metrics import Metric, Sink
from pipelines.training.validation import Scores
from workers.training.trainer import StepReport

TRAINING_METRICS: Mapping[str, Metric] = {
    "labelfleet_training_step": Metric("gauge", "Steps done, of all invocations."),
    "labelfleet_training_steps_total": Metric("counter", "Steps done by these workers."),
    "labelfleet_training_images_total": Metric("counter", "Images seen by these workers."),
    "labelfleet_training_loss": Metric("gauge", "Loss of the last step."),
    "labelfleet_training_lr": Metric("gauge", "Learning rate of the last step."),
    "labelfleet_training_workers": Metric("gauge", "Workers that train together."),
    "labelfleet_training_score": Metric(
        "gauge", "Of the last validation: mAP, mAP50, mAP75, AR.", ("score",)
    ),
}


class MeasuredTraining:
    """A listener that exports the figures to a sink.

    Args:
        batch_size: images a step, of all workers together.
    """

    def __init__(self, sink: Sink, *, workers: int, batch_size: int) -> None:
        self._sink, self._batch_size = sink, batch_size
        sink.set("labelfleet_training_workers", workers)

    def step(self, report: StepReport) -> None:
        """Export one step."""
        self._sink.add("labelfleet_training_steps_total", 1)
        self._sink.add("labelfleet_training_images_total", self._batch_size)
        self._sink.set("labelfleet_training_step", report.step)
        self._sink.set("labelfleet_training_loss", report.loss)
        self._sink.set("labelfleet_training_lr", report.lr)

    def validated(self, step: int, scores: Scores) -> None:
        """Export one validation."""
        shown = {"mAP": scores.map_, "mAP50": scores.map50, "mAP75": scores.map75, "AR": scores.ar}
        for name, value in shown.items():
            self._sink.set("labelfleet_training_score", value, score=name)

    def close(self) -> None:
        """Say that these workers no longer train."""
        self._sink.set("labelfleet_training_workers", 0)

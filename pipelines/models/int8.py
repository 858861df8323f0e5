"""An INT8 model: calibrated, searched, judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.models.graph import Say, exported_graph, own_facts
from pipelines.models.loss_interval import agreement, loss_between, match
from pipelines.models.measure import (
    Expected,
    detect_all,
    expected_from_detections,
    expected_from_truth,
    mean_ap,
    refuse_unmeasured,
)
from pipelines.models.sample_images import Inputs, measured, sample
from storage.coco.truth import Truth
from storage.errors import ConfigError
from storage.records import Detections
from workers.compile.make_artefact import GRAPH, Made, versions
from workers.compile.quantize import Verdict
from workers.detectors.graph import GraphDetector
from workers.models.load import session_of
from workers.runtimes.artefacts import Artefact
from workers.spec import ModelSpec

CALIBRATION_IMAGES = 128
AGREEMENT_IMAGES = 64
_LEAST = 8  # images, to calibrate on some and compare on others


_FLOOR = 0.01  # of scores, when mAP is measured


@dataclass(frozen=True, slots=True)
class Limits:
    """What INT8 must keep: ``model.max_loss`` and ``model.min_agreement``."""

    max_loss: float
    min_agreement: float

    @staticmethod
    def of(config: RunConfig) -> Limits:
        """Return the limits of a run."""
        return Limits(config.model.max_loss, config.model.min_agreement)

    @property
    def any_loss(self) -> bool:
        """Whether everything passes."""
        return self.max_loss >= 100


@dataclass(frozen=True, slots=True)
class Judge:
    """Measure what a model loses against fp32 on the same images.

    Attributes:
        fp32: what the float32 model finds on ``inputs``.
        expected: boxes to find: the truth's, or those that fp32 is sure of.
        against: the truth's URL, or ``fp32``.
        limits: what passes.
    """

    spec: ModelSpec
    inputs: Inputs
    fp32: tuple[Detections, ...]
    expected: Expected
    against: str
    limits: Limits

    @staticmethod
    def by_truth(config: RunConfig, spec: ModelSpec, graph: Artefact, truth: Truth) -> Judge:
        """Ground truth of images in the source."""
        inputs, indices = measured(config, spec.preprocessing, truth)
        expected = expected_from_truth(truth, indices, spec.classes)
        found = tuple(detect_all(_detector(spec, graph), inputs))
        return Judge(spec, inputs, found, expected, truth.source, Limits.of(config))

    @staticmethod
    def by_agreement(spec: ModelSpec, graph: Artefact, inputs: Inputs, limits: Limits) -> Judge:
        """Use the float32 model's sure boxes as ground truth."""
        found = tuple(detect_all(_detector(spec, graph), inputs))
        expected = expected_from_detections(found, len(spec.classes))
        return Judge(spec, inputs, found, expected, "fp32", limits)

    @property
    def fp32_map(self) -> float:
        """mAP of the float32 model in points; against itself 100, or 0 where it is never sure."""
        return mean_ap(self.fp32, self.expected)

    def loss(self, artefact: Artefact) -> float:
        """Return the points of mAP that a model loses."""
        found = detect_all(_detector(self.spec, artefact), self.inputs)
        return self.fp32_map - mean_ap(found, self.expected)

    def verdict(self, artefact: Artefact) -> Verdict:
        """Points lost with their interval, the agreement with fp32, and whether both pass."""
        return self.compare(detect_all(_detector(self.spec, artefact), self.inputs))

    def compare(self, found: Sequence[Detections]) -> Verdict:
        """Return the verdict on a model that found this on the judge's images."""
        lost = loss_between(match(self.fp32, self.expected), match(found, self.expected))
        share = agreement(self.fp32, found)
        kept = lost.high <= self.limits.max_loss and share.low >= self.limits.min_agreement
        return Verdict(
            lost.value, lost.low, lost.high,
            1.0 if share.value is None else share.value, share.low,
            passed=kept or self.limits.any_loss,
        )  # fmt: skip

    def figures(self, found: Verdict) -> dict[str, Any]:
        """For ``artefact.json``; points of mAP."""
        fp32 = self.fp32_map
        return {
            "images": len(self.inputs),
            "against": self.against,
            "fp32_map": round(fp32, 3),
            "int8_map": round(fp32 - found.loss, 3),
            "loss": round(found.loss, 3),
            "loss_interval": [round(found.low, 3), round(found.high, 3)],
            "max_loss": self.limits.max_loss,
            "agreement": round(found.agreement, 4),
            "agreement_low": round(found.agreement_low, 4),
            "min_agreement": self.limits.min_agreement,
        }


def _detector(spec: ModelSpec, artefact: Artefact) -> GraphDetector:
    low = replace(spec, score_floor=min(_FLOOR, spec.score_floor))
    plain = replace(low, precision="fp32") if artefact.main == GRAPH else low
    return GraphDetector(session_of(artefact, plain, threads=0), plain)


@dataclass(frozen=True, slots=True)
class Against:
    """What an INT8 model is measured against.

    Attributes:
        truth: of images of the source; None: by agreement with fp32.
        reference: the model whose fp32 counts, where it is not the one that is quantised: a
            finished model is judged by the one that it was before.
    """

    truth: Truth | None = None
    reference: ModelSpec | None = None


def make_int8(config: RunConfig, spec: ModelSpec, against: Against, work: Path, say: Say) -> Made:
    """Return the model in INT8, with as few blocks in float32 as pass.

    Raises:
        Int8Refused: none pass; with the figures of the last choice.
        ArtefactError: the loss cannot be measured.
        ConfigError: there are too few images to calibrate on.
    """
    from workers.compile.family_scheme import family_scheme
    from workers.compile.quantize import Int8Refused, Quantiser, search

    truth = against.truth
    graph = exported_graph(config, replace(spec, precision="fp32"), work, say)
    reference = graph
    if against.reference is not None:
        reference = exported_graph(config, replace(against.reference, precision="fp32"), work, say)
    inputs = sample(
        config, spec.preprocessing, CALIBRATION_IMAGES + (0 if truth else AGREEMENT_IMAGES), truth
    )
    if len(inputs) < _LEAST:
        raise ConfigError(
            f"INT8 needs at least {_LEAST} images to calibrate on, and the source has "
            f"{len(inputs)}" + (" beside those of the ground truth" if truth else ""),
            hint="use `precision: fp32`",
        )
    calibration = inputs
    if truth is not None:
        say(f"measuring fp32 on {len(truth.images)} images of {truth.source}")
        judge = Judge.by_truth(config, spec, reference, truth)
    else:
        cut = max(_LEAST // 2, len(inputs) - AGREEMENT_IMAGES, len(inputs) * 2 // 3)
        calibration = inputs.part(0, min(cut, CALIBRATION_IMAGES))
        held_out = inputs.part(len(calibration), len(inputs))
        judge = Judge.by_agreement(spec, reference, held_out, Limits.of(config))
    refuse_unmeasured(judge.fp32_map, len(judge.inputs), judge.against, config.model.max_loss)
    say(f"quantising, calibrated on {len(calibration)} images of the source")
    path = graph.files[GRAPH]
    scheme = None if spec.convention is None else family_scheme(path, spec)
    quantiser = Quantiser(path, calibration.pixels, work, spec.runtime, scheme)
    try:
        chosen = search(quantiser, judge, config.model.max_loss, say, scheme)
    except Int8Refused as refused:
        if refused.verdict is not None:
            refused.measured = judge.figures(refused.verdict)
        raise
    facts = {
        **own_facts(graph.facts),
        "graph_precision": "int8",
        "versions": versions(spec),
        "calibration": {
            "images": len(calibration),
            "sha256": calibration.sha256,
            "image_ids": list(calibration.image_ids),
        },
        "measured": judge.figures(chosen.verdict),
        "kept": list(chosen.kept),
        "trials": [asdict(trial) for trial in chosen.trials],
        "loss_with_block_in_float32": dict(chosen.alone),
    }
    return Made(chosen.artefact.files, chosen.artefact.main, facts)

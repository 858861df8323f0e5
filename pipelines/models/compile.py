"""From a config to the artefact that its workers load: found where it lies, or made once.

    resolve the model ─> find the artefact by its key ─> export, compare, quantise, measure ─> put

``labelfleet compile`` does it by itself, ``labelfleet run`` on its way.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig, load_config
from pipelines.config.source import check_places
from pipelines.models.measure import (
    Expected,
    detect_all,
    expected_from_detections,
    expected_from_truth,
    mean_ap,
    refuse_unmeasured,
)
from pipelines.models.sample_images import Inputs, measured, sample, unseen
from pipelines.models.view import CompileSummary, say
from pipelines.truth.coco_truth import Truth, read_truth
from storage.errors import ArtefactError, ConfigError
from storage.objects.protocols import ObjectStore, normalise_url, open_store
from workers.checkpoints.cache import private_folder
from workers.compile.make_artefact import GRAPH, Made, artefact_key, make_graph, versions
from workers.detectors.graph import GraphDetector
from workers.local_folders import cache_folder
from workers.runtimes.artefacts import Artefact, fetch_artefact, find, publish
from workers.runtimes.choose import needs_artefact, session_of
from workers.spec import ArtefactRef, ModelSpec

CALIBRATION_IMAGES = 128
AGREEMENT_IMAGES = 64
FOLDER = "model"
_LEAST = 8  # images, to calibrate on some and compare on others
_FLOOR = 0.01  # of scores, when mAP is measured

Say = Callable[[str], None]


def with_artefact(
    config: RunConfig, spec: ModelSpec, *, say: Say = say, truth: Truth | None = None
) -> ModelSpec:
    """``spec`` with the artefact that its runtime loads; torch needs none.

    Args:
        truth: INT8's loss is measured on it; None: by agreement with fp32.

    Raises:
        ArtefactError: it does not agree with torch, or loses more than ``model.max_loss``.
        LabelfleetError: checkpoint, source or output cannot be used.
    """
    if not needs_artefact(spec):
        return spec
    ref = find_artefact(config, spec)
    if ref is None:
        store, prefix = artefact_place(config)
        folder = f"{prefix}{artefact_key(spec, _more(config, spec))}"
        with tempfile.TemporaryDirectory(prefix="labelfleet-compile-") as work:
            made = _make(config, spec, truth, Path(work), say)
            ref = publish(store, folder, made.files, made.main, made.facts)
        say(f"artefact: {ref.url}")
    return replace(spec, artefact=ref)


def compile_model(config: RunConfig, *, cuda: bool, truth: Truth | None = None) -> CompileSummary:
    """Find or make the artefact of a config's model; with ``truth``, measure it in any case.

    Args:
        cuda: whether the workers have GPUs; the run's own record is what counts where there is one.

    Raises:
        ArtefactError: as ``with_artefact``; or one that is there loses more on ``truth`` than
            ``model.max_loss``.
        LabelfleetError: config, checkpoint, source or output cannot be used.
    """
    from pipelines.labelling.open_run import requested_model

    spec = requested_model(config, cuda=cuda)
    before = spec.artefact or (find_artefact(config, spec) if needs_artefact(spec) else None)
    spec = (
        replace(spec, artefact=before)
        if before
        else with_artefact(config, spec, say=say, truth=truth)
    )
    if spec.artefact is None:
        return CompileSummary(spec.runtime, spec.precision, None, None, {}, new=False)
    artefact = fetch_artefact(spec.artefact, config.storage.options())
    checked = None
    if before and truth is not None and spec.precision == "int8":
        checked = _check(config, spec, artefact, truth)
    ref = spec.artefact
    return CompileSummary(
        spec.runtime, spec.precision, ref.url, ref.sha256, artefact.facts, not before, checked
    )


def _check(
    config: RunConfig, spec: ModelSpec, artefact: Artefact, truth: Truth
) -> Mapping[str, Any]:
    """Figures of an INT8 model that was there already; refused when it loses too much.

    It may have been made without this ground truth: what it was calibrated on is left out.
    """
    others = unseen(truth, artefact.facts.get("calibration", {}).get("image_ids", ()))
    if not others.images:
        raise ArtefactError(
            f"the INT8 model that is there was calibrated on all images of {truth.source}",
            hint="remove its folder, and compile again with this ground truth",
        )
    with tempfile.TemporaryDirectory(prefix="labelfleet-compile-") as work:
        graph = _graph(config, replace(spec, precision="fp32"), Path(work), say)
        judge = Judge.by_truth(config, spec, graph, others)
    refuse_unmeasured(judge.fp32, len(judge.inputs), judge.against, config.model.max_loss)
    loss = judge.loss(artefact)
    if loss > config.model.max_loss:
        raise ArtefactError(
            f"the INT8 model that is there loses {loss:.2f} points on {truth.source}, more than "
            f"the {config.model.max_loss:g} that model.max_loss allows",
            hint="remove its folder, and compile again with this ground truth",
        )
    return judge.figures(loss, config.model.max_loss)


def find_artefact(config: RunConfig, spec: ModelSpec) -> ArtefactRef | None:
    """The artefact of that model where it belongs, or None."""
    store, prefix = artefact_place(config)
    return find(store, f"{prefix}{artefact_key(spec, _more(config, spec))}")


def artefact_place(config: RunConfig) -> tuple[ObjectStore, str]:
    """The store that holds artefacts, and what their keys begin with."""
    options = config.storage.options()
    if config.model.artefacts is not None:
        return open_store(config.model.artefacts, options), ""
    return open_store(config.output, options), f"{FOLDER}/"


def _more(config: RunConfig, spec: ModelSpec) -> Mapping[str, Any]:
    """What an INT8 model depends on beside the network: whose images, and how good it must be."""
    if spec.precision != "int8":
        return {}
    part = config.source
    return {
        "source": [normalise_url(part.url), part.kind, part.include, part.exclude, part.keys],
        "max_loss": config.model.max_loss,
    }


def _make(config: RunConfig, spec: ModelSpec, truth: Truth | None, work: Path, say: Say) -> Made:
    if spec.precision == "int8":
        return _int8(config, spec, truth, work, say)
    artefact = _graph(config, spec, work, say)
    return Made(artefact.files, artefact.main, _own(artefact.facts))


def _own(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what publishing adds."""
    return {k: v for k, v in facts.items() if k not in ("format", "main", "files")}


def _graph(config: RunConfig, spec: ModelSpec, work: Path, say: Say) -> Artefact:
    """The exported graph, from this user's cache or made now."""
    cache, folder = private_folder(cache_folder() / "artefacts"), artefact_key(spec)
    local, options = open_store(str(cache)), config.storage.options()
    if (ref := find(local, folder)) is not None:
        try:
            return fetch_artefact(ref, options)
        except ArtefactError:
            say("the cached graph is damaged, and made again")
            shutil.rmtree(cache / folder)
    few = sample(config, spec.preprocessing, 4)
    made = make_graph(spec, options, few.pixels, work, say)
    return fetch_artefact(publish(local, folder, made.files, made.main, made.facts), options)


@dataclass(frozen=True, slots=True)
class Judge:
    """Says what a model loses against fp32, in points of mAP.

    Attributes:
        fp32: mAP of the float32 model: against the truth, or (100 by nature) against itself.
        against: the truth's URL, or ``fp32``.
    """

    spec: ModelSpec
    inputs: Inputs
    expected: Expected
    fp32: float
    against: str

    @staticmethod
    def by_truth(config: RunConfig, spec: ModelSpec, graph: Artefact, truth: Truth) -> Judge:
        """Ground truth of images in the source."""
        inputs, indices = measured(config, spec.preprocessing, truth)
        expected = expected_from_truth(truth, indices, spec.classes)
        found = detect_all(_detector(spec, graph), inputs)
        return Judge(spec, inputs, expected, mean_ap(found, expected), truth.source)

    @staticmethod
    def by_agreement(spec: ModelSpec, graph: Artefact, inputs: Inputs) -> Judge:
        """What the float32 model is sure of stands in for ground truth."""
        found = detect_all(_detector(spec, graph), inputs)
        expected = expected_from_detections(found, len(spec.classes))
        return Judge(spec, inputs, expected, mean_ap(found, expected), "fp32")

    def score(self, artefact: Artefact) -> float:
        """mAP of a model, in points."""
        return mean_ap(detect_all(_detector(self.spec, artefact), self.inputs), self.expected)

    def loss(self, artefact: Artefact) -> float:
        """Points of mAP that a model loses."""
        return self.fp32 - self.score(artefact)

    def figures(self, loss: float, limit: float) -> dict[str, Any]:
        """For ``artefact.json``; points of mAP."""
        return {
            "images": len(self.inputs),
            "against": self.against,
            "fp32_map": round(self.fp32, 3),
            "int8_map": round(self.fp32 - loss, 3),
            "loss": round(loss, 3),
            "max_loss": limit,
        }


def _detector(spec: ModelSpec, artefact: Artefact) -> GraphDetector:
    low = replace(spec, score_floor=min(_FLOOR, spec.score_floor))
    plain = replace(low, precision="fp32") if artefact.main == GRAPH else low
    return GraphDetector(session_of(artefact, plain, threads=0), plain)


def _int8(config: RunConfig, spec: ModelSpec, truth: Truth | None, work: Path, say: Say) -> Made:
    from workers.compile.quantize import Quantiser, search

    graph = _graph(config, replace(spec, precision="fp32"), work, say)
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
        judge = Judge.by_truth(config, spec, graph, truth)
    else:
        cut = max(_LEAST // 2, len(inputs) - AGREEMENT_IMAGES, len(inputs) * 2 // 3)
        calibration = inputs.part(0, min(cut, CALIBRATION_IMAGES))
        held_out = inputs.part(len(calibration), len(inputs))
        judge = Judge.by_agreement(spec, graph, held_out)
    refuse_unmeasured(judge.fp32, len(judge.inputs), judge.against, config.model.max_loss)
    say(f"quantising, calibrated on {len(calibration)} images of the source")
    quantiser = Quantiser(graph.files[GRAPH], calibration.pixels, work, spec.runtime)
    chosen = search(quantiser, judge.loss, config.model.max_loss, say)
    facts = {
        **_own(graph.facts),
        "graph_precision": "int8",
        "versions": versions(spec),
        "calibration": {
            "images": len(calibration),
            "sha256": calibration.sha256,
            "image_ids": list(calibration.image_ids),
        },
        "measured": judge.figures(chosen.loss, config.model.max_loss),
        "kept": list(chosen.kept),
        "trials": [asdict(trial) for trial in chosen.trials],
        "loss_with_block_in_float32": dict(chosen.alone),
    }
    return Made(chosen.artefact.files, chosen.artefact.main, facts)


def compile_from_file(path: str, overrides: tuple[str, ...], truth: str | None) -> CompileSummary:
    """``labelfleet compile``: GPUs are those of this machine, unless ``workers.gpus: 0``."""
    config = load_config(path, overrides)
    check_places(config)
    options = config.storage.options()
    known = read_truth(truth, options) if truth else None
    return compile_model(config, cuda=config.workers.gpus != 0 and has_gpu(), truth=known)


def has_gpu() -> bool:
    """Whether torch sees a CUDA device here."""
    import torch

    return torch.cuda.is_available()

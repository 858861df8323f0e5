"""The teacher gate: run the pipeline on labelled images, and try settings that may be wrong.

resolve, compile ─> decode, prepare, detect, NMS ─> mAP ─> below the mark: one trial a setting
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.config.run_config import RunConfig, load_config
from pipelines.config.source import check_places
from pipelines.evaluation.gate import GateResult, Setting, Trial, best_order
from pipelines.models.artefact import logged, with_artefact
from pipelines.models.compile import has_gpu
from pipelines.models.graph import Say, exported_graph
from pipelines.models.measure import Expected, detect_all, expected_from_truth, mean_ap
from pipelines.models.requested import requested_model
from pipelines.models.sample_images import Inputs, measured
from pipelines.truth.coco_truth import is_ignore_class, match_categories
from storage.coco.truth import Truth, read_truth
from storage.errors import ConfigError, LabelfleetError, TruthMismatch
from storage.records import Detections
from workers.checkpoints.cache import fetch_checkpoint
from workers.detectors.graph import detector_around
from workers.detectors.protocol import Detector
from workers.images.preprocessing import Preprocessing
from workers.models.families import read_ports
from workers.models.load import load_detector, session_of
from workers.models.resolve import STRIDE, at_size, in_words
from workers.spec import ModelSpec

TRIAL_IMAGES = 200
_PADDINGS: tuple[Literal["center", "bottom_right"], ...] = ("center", "bottom_right")
_FACTORS = (0.5, 0.65, 0.75, 1.35, 1.5, 2.0)  # of the input's sides
_SIDES = (96, 1536)  # smallest and largest that is tried


def gate_from_file(
    path: str,
    overrides: tuple[str, ...],
    truth: str | None,
    min_map: float | None,
    say: Say = logged,
) -> GateResult:
    """``labelfleet gate``: what is not given comes from the config's own `gate` section.

    Raises:
        LabelfleetError: as ``measure_gate``; or truth or mark are missing.
    """
    config = load_config(path, overrides)
    check_places(config)
    part = config.gate
    truth = truth or (part.truth if part else None)
    min_map = min_map if min_map is not None else (part.min_map if part else None)
    if truth is None or min_map is None:
        raise ConfigError(
            f"{path} has no `gate` section, and --truth and --min-map are not both given",
            hint="add `gate: {truth: instances.json, min_map: 0.4}`, or give both",
        )
    spec = requested_model(config, cuda=config.workers.gpus != 0 and has_gpu())
    spec = with_artefact(config, spec, say=say)
    return measure_gate(config, spec, truth, min_map, say)


def measure_gate(
    config: RunConfig, spec: ModelSpec, truth: str, min_map: float, say: Say = logged
) -> GateResult:
    """Measure a model on labelled images of the source; below the mark, look for the cause.

    Args:
        config: the run; its source has to hold the images.
        spec: its model, ready to load.
        truth: URL of COCO ground truth.
        min_map: the mark, 0 to 1.
        say: told of each step, in a line for people.

    Raises:
        TruthMismatch: the source holds none of the images, or none that can be read.
        LabelfleetError: source, truth or model cannot be used.
    """
    known = read_truth(truth, config.storage.options())
    spec = _runnable_here(spec, say)
    say(f"gate: measuring on the images of {known.source}")
    bench = _Bench.of(config, spec, known)
    map_ = bench.map_of(bench.found())
    result = GateResult(
        map_, min_map, len(bench.inputs), len(known.images), known.source,
        in_words(spec.preprocessing), bench.unknown,
    )  # fmt: skip
    if result.passed:
        return result
    say(f"gate: {result.verdict}; looking for the cause")
    if len(bench.inputs) > TRIAL_IMAGES:
        bench = _Bench.of(config, spec, _thinned(known))
        map_ = bench.map_of(bench.found())
    trials = sorted(_trials(bench, say), key=lambda trial: -trial.map_)
    return replace(result, trials=tuple(trials), trial_images=len(bench.inputs), trial_base=map_)


def _runnable_here(spec: ModelSpec, say: Say) -> ModelSpec:
    """Return the model on this machine's CPU, where only the workers have GPUs."""
    if spec.device == "cpu" or has_gpu():
        return spec
    say("gate: this machine has no GPU, so the model is measured on the CPU in float32")
    runtime = spec.runtime if spec.convention else "torch"
    return replace(spec, device="cpu", precision="fp32", runtime=runtime)


def _thinned(truth: Truth) -> Truth:
    """Return every n-th image of the ground truth, about as many as a trial takes."""
    step = -(-len(truth.images) // TRIAL_IMAGES)
    return replace(
        truth,
        images=truth.images[::step],
        boxes=truth.boxes[::step],
        regions=truth.regions[::step],
    )


@dataclass(frozen=True, slots=True)
class _Bench:
    """Labelled images, ready for a model."""

    config: RunConfig
    spec: ModelSpec
    truth: Truth
    detector: Detector
    inputs: Inputs
    expected: Expected

    @staticmethod
    def of(config: RunConfig, spec: ModelSpec, truth: Truth) -> _Bench:
        inputs, indices = measured(config, spec.preprocessing, truth)
        if not len(inputs):
            raise TruthMismatch(
                f"no image of {truth.source} can be read from the source",
                hint="is this the ground truth of this source?",
            )
        expected = expected_from_truth(truth, indices, spec.classes)
        detector = load_detector(spec, config.storage.options(), threads=_cores())
        return _Bench(config, spec, truth, detector, inputs, expected)

    def found(self, *, swapped: bool = False) -> list[Detections]:
        """Return the model's detections; ``swapped`` feeds BGR for RGB, or the reverse."""
        inputs = self.inputs
        if swapped:
            inputs = replace(inputs, pixels=inputs.pixels[..., ::-1])
        return detect_all(self.detector, inputs)

    def prepared_as(self, preprocessing: Preprocessing) -> Inputs:
        """Return the images as another preprocessing makes them."""
        return measured(self.config, preprocessing, self.truth)[0]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Classes of the ground truth's boxes that the model lacks."""
        named = self.truth.categories
        lacking = named.keys() - match_categories(self.spec.classes, named).keys()
        boxed = {box.category_id for boxes in self.truth.boxes for box in boxes}
        return tuple(named[i] for i in sorted(lacking & boxed) if not is_ignore_class(named[i]))

    def map_of(self, found: list[Detections]) -> float:
        """Of detections, 0 to 1."""
        return mean_ap(found, self.expected) / 100


def _cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _trials(bench: _Bench, say: Say) -> Iterator[Trial]:
    for kind in (_other_channels, _other_letterboxes, _other_sizes, _other_orders):
        for trial in kind(bench, say):
            say(f"gate: {trial.map_:.3f} with {trial.change}")
            yield trial


def _stated(spec: ModelSpec, field: str, value: str) -> str:
    """Return how a field of the preprocessing is written into the config."""
    if spec.convention is None:
        return f"state all of `model.preprocessing`, with `{field}: {value}`"
    return (
        f"state it over the family's own, `model.family: {{base: …, input: {{{field}: {value}}}}}`"
    )


def _other_channels(bench: _Bench, say: Say) -> Iterator[Trial]:
    other = "BGR" if bench.spec.preprocessing.channels == "RGB" else "RGB"
    map_ = bench.map_of(bench.found(swapped=True))
    yield Trial("channels", f"channels {other}", _stated(bench.spec, "channels", other), map_)


def _other_letterboxes(bench: _Bench, say: Say) -> Iterator[Trial]:
    """Yield the image elsewhere in the input, and stretched in place of padded."""
    now = bench.spec.preprocessing
    center, corner = (replace(now, keep_aspect=True, padding=p) for p in _PADDINGS)
    stretched = replace(now, keep_aspect=False, resize_to=now.size)
    variants = [
        (center, "place", "center", "the image padded around the centre"),
        (corner, "place", "top_left", "the image at the top left"),
        (stretched, "resize", "stretch", "the image stretched to the whole input"),
    ]
    for other, field, value, change in variants:
        if other == now or not (now.keep_aspect or other.keep_aspect):
            continue
        found = detect_all(bench.detector, bench.prepared_as(other))
        remedy = _stated(bench.spec, field, value)
        yield Trial("letterbox", change, remedy, bench.map_of(found))


def _other_sizes(bench: _Bench, say: Say) -> Iterator[Trial]:
    setting: Setting = "image_size"
    options = bench.config.storage.options()
    if bench.spec.convention is not None:
        path = fetch_checkpoint(bench.spec.checkpoint, options, sha256=bench.spec.sha256)
        if None not in read_ports(path).image.shape[2:]:
            return  # the graph fixes it
    for height, width in _sizes(bench.spec.preprocessing.size):
        preprocessing = at_size(bench.spec.preprocessing, (height, width))
        try:
            detector = _at(bench, preprocessing, say)
        except LabelfleetError as exc:
            say(f"gate: {height} × {width} could not be tried: {exc.message}")
            continue
        found = detect_all(detector, bench.prepared_as(preprocessing))
        field = (
            "model.preprocessing.size" if bench.config.model.preprocessing else "model.image_size"
        )
        remedy = f"`{field}: {height if height == width else [height, width]}`"
        change = f"images of {height} × {width}"
        yield Trial(setting, change, remedy, bench.map_of(found))


def _sizes(now: tuple[int, int]) -> list[tuple[int, int]]:
    sizes = {
        (round(now[0] * f / STRIDE) * STRIDE, round(now[1] * f / STRIDE) * STRIDE) for f in _FACTORS
    }
    low, high = _SIDES
    return sorted(s for s in sizes if s != now and low <= min(s) and max(s) <= high)


def _at(bench: _Bench, preprocessing: Preprocessing, say: Say) -> Detector:
    """Return the model at another input size, in float32."""
    spec = replace(bench.spec, preprocessing=preprocessing, precision="fp32", artefact=None)
    if spec.convention is None:
        options = bench.config.storage.options()
        return load_detector(replace(spec, runtime="torch"), options, threads=_cores())
    spec = replace(spec, runtime="onnx")
    with tempfile.TemporaryDirectory(prefix="labelfleet-gate-") as work:
        graph = exported_graph(bench.config, spec, Path(work), say)
    return detector_around(session_of(graph, spec, threads=_cores()), spec)


def _other_orders(bench: _Bench, say: Say) -> Iterator[Trial]:
    """Yield the same boxes under the class names that the truth gives them."""
    found, classes = bench.found(), bench.spec.classes
    order = best_order(found, bench.expected.images, len(classes))
    if np.array_equal(order, np.arange(len(classes))):
        return
    renamed = [replace(one, category_ids=order[one.category_ids].astype(np.int16)) for one in found]
    names = [classes[index] for index in order]
    moved = [f"{classes[i]} → {names[i]}" for i in range(len(names)) if order[i] != i]
    shown = ", ".join(moved[:5]) + (f" and {len(moved) - 5} more" if len(moved) > 5 else "")
    remedy = (
        f"`model.classes: [{', '.join(names)}]`"
        if len(names) <= 12
        else "put the names in `model.classes` into the order of training"
    )
    yield Trial("classes", f"classes renamed ({shown})", remedy, bench.map_of(renamed))

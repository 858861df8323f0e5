"""INT8 by post-training quantization with NNCF, except for layers that measurably hurt.

The graph's convolutions form groups, the blocks of YOLO-NAS. The heads' last convolutions and box
decoding always stay in float32. Until the model passes with confidence, every other group is
returned to float32 in turn and the loss measured; the group that recovers most stays in float32,
and the search continues from there. (What a group recovers alone does not predict what it recovers
beside another: on bccd the stem alone makes things worse, but recovers half of the rest once stage
1 is in float32. The error of the class logits was tried as a cheaper measure; it selects other
blocks than those that cost mAP.)
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.errors import ArtefactError, ModelError
from workers.runtimes.artefacts import Artefact
from workers.runtimes.openvino_session import WEIGHTS, import_openvino
from workers.spec import RuntimeName

MODEL = "model.xml"
QDQ_MODEL = "model-int8.onnx"
# Groups by the names that the export gives their operators; of the heads, all three levels.
GROUPS = {
    "backbone.stem": "/backbone/stem/",
    "backbone.stage1": "/backbone/stage1/",
    "backbone.stage2": "/backbone/stage2/",
    "backbone.stage3": "/backbone/stage3/",
    "backbone.stage4": "/backbone/stage4/",
    "backbone.context_module": "/backbone/context_module/",
    "neck.neck1": "/neck/neck1/",
    "neck.neck2": "/neck/neck2/",
    "neck.neck3": "/neck/neck3/",
    "neck.neck4": "/neck/neck4/",
    "neck.upsample": "ConvolutionBackpropData_",  # the only ones that the importer renames
    "heads.stem": "/stem/",
    "heads.cls_convs": "/cls_convs/",
    "heads.reg_convs": "/reg_convs/",
    "heads.cls_pred": "/cls_pred(_[0-9]+)?/",
    "heads.reg_pred": "/reg_pred(_[0-9]+)?/",
}
RECIPE = ("heads.cls_pred", "heads.reg_pred")
_DECODING = "^/[^/]+$"  # normalisation, DFL, selection: operators of no module
_MOST = 5  # groups that may stay in float32 beside the recipe's
_FEW = 24  # images to calibrate on where groups are only compared

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a graph other than YOLO-NAS's is quantised.

    Attributes:
        groups: patterns of operator names, by the group's name.
        recipe: groups that always stay in float32.
        feed: the graph's inputs for one letterboxed image, uint8 [H, W, 3].
        facts: what a session needs to know of the quantised graph and cannot read from it.
        plain: types of operators that stay in float32 everywhere, as ONNX or OpenVINO calls them.
    """

    groups: Mapping[str, str]
    recipe: tuple[str, ...]
    feed: Callable[[NDArray[np.uint8]], dict[str, Any]]
    facts: Mapping[str, Any]
    plain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The loss of an INT8 model against float32 on the same images.

    Attributes:
        loss: points of mAP; ``low`` to ``high`` is its 90 % interval over images, so the loss is
            at most ``high`` with 95 % confidence.
        agreement: share of the boxes with a score from 0.5 that both have; ``agreement_low`` is
            the lower end of its interval.
        passed: both are within the allowed limits with that confidence.
    """

    loss: float
    low: float
    high: float
    agreement: float
    agreement_low: float
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.loss:+.2f} points lost [{self.low:+.2f}, {self.high:+.2f}], "
            f"{self.agreement:.1%} of sure boxes as in fp32 (at least {self.agreement_low:.1%})"
        )


class Judging(Protocol):
    """Measures models of one graph on images that were not calibrated on."""

    def loss(self, artefact: Artefact) -> float:
        """Points of mAP lost, to compare blocks."""
        ...

    def verdict(self, artefact: Artefact) -> Verdict:
        """Points lost with their interval, the agreement, and whether that is good enough."""
        ...


@dataclass(frozen=True, slots=True)
class Trial:
    """One choice of groups kept in float32, and what it lost."""

    kept: tuple[str, ...]
    loss: float
    low: float
    high: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Quantised:
    """The model that was chosen, and all that was tried.

    Attributes:
        alone: the loss with that one group in float32 beside the recipe's; empty where the recipe
            was enough.
    """

    artefact: Artefact
    kept: tuple[str, ...]
    verdict: Verdict
    trials: tuple[Trial, ...]
    alone: Mapping[str, float]


def import_nncf() -> Any:
    """Return the ``nncf`` module, silent and without its usage statistics. Raises ModelError."""
    import_openvino()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import nncf
    except ImportError as exc:
        raise ModelError(
            f"NNCF does not load here: {exc}", hint="pip install 'labelfleet[openvino]'"
        ) from exc
    nncf.set_log_level(logging.ERROR)
    return nncf


class Int8Refused(ArtefactError):
    """No choice of blocks passed.

    Attributes:
        verdict: of the last one; None where the error crossed a process border.
        trials: all that were judged.
        measured: the verdict's figures; filled in by the caller, which knows the images.
    """

    verdict: Verdict | None = None
    trials: tuple[Trial, ...] = ()
    measured: Mapping[str, Any] = MappingProxyType({})


class Quantiser:
    """Quantises one graph, calibrated on one set of images, with any groups left out.

    Args:
        graph: ONNX in float32.
        images: uint8 [N, H, W, 3], letterboxed; never images that are measured on.
        folder: local, for the results.
        scheme: of another family's graph; None: YOLO-NAS.
        runtime: OpenVINO gets its IR; the others ONNX with QuantizeLinear and DequantizeLinear.
    """

    def __init__(
        self,
        graph: Path,
        images: NDArray[np.uint8],
        folder: Path,
        runtime: RuntimeName,
        scheme: Scheme | None = None,
    ) -> None:
        self._nncf, self._ov = import_nncf(), import_openvino()
        self._graph, self._folder = graph, folder
        self._runtime = runtime
        self._images = images
        self._scheme = scheme
        self._made = 0

    def quantise(self, kept: Sequence[str], *, few: bool = False) -> Artefact:
        """Quantise all but the groups ``kept`` to INT8, into a new folder.

        ``few``: calibrated on some of the images, which is enough to compare groups.
        """
        step = max(1, len(self._images) // _FEW) if few else 1
        quantised = self._quantised(kept, self._images[::step])
        self._made += 1
        folder = self._folder / f"int8-{self._made}"
        folder.mkdir()
        facts = {} if self._scheme is None else self._scheme.facts
        if self._runtime == "openvino":
            self._ov.save_model(quantised, folder / MODEL, compress_to_fp16=False)
            return Artefact({name: folder / name for name in (MODEL, WEIGHTS)}, MODEL, facts)
        if self._runtime == "tensorrt":
            _make_signed(quantised)
        (folder / QDQ_MODEL).write_bytes(quantised.SerializeToString())
        return Artefact({QDQ_MODEL: folder / QDQ_MODEL}, QDQ_MODEL, facts)

    def _read(self) -> Any:
        """Return the float32 graph as NNCF takes it."""
        if self._runtime == "openvino":
            return self._ov.Core().read_model(self._graph)
        import onnx

        return _constants_as_initializers(onnx.load(str(self._graph)))

    def _quantised(self, kept: Sequence[str], images: NDArray[np.uint8]) -> Any:
        nncf = self._nncf
        model = self._read()
        presets, overflow = nncf.QuantizationPreset, nncf.OverflowFix
        gpu = self._runtime == "tensorrt"
        if self._scheme is None:
            data = nncf.Dataset(images, lambda image: {"images": image[None]})
            patterns = [*(f"^{GROUPS[name]}.*" for name in kept), _DECODING]
        else:
            data = nncf.Dataset(images, self._scheme.feed)
            patterns = [self._scheme.groups[name] for name in kept]
        plain = [] if self._scheme is None else list(self._scheme.plain)
        with contextlib.redirect_stdout(io.StringIO()):
            return nncf.quantize(
                model,
                data,
                subset_size=len(images),
                target_device=nncf.TargetDevice.CPU,
                ignored_scope=nncf.IgnoredScope(patterns=patterns, types=plain, validate=False),
                # Asymmetric activations where their range is; TensorRT knows symmetric ones only.
                preset=presets.MIXED if self._runtime == "openvino" else presets.PERFORMANCE,
                # 7 bits where CPUs without VNNI would overflow, so that all of them agree.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=overflow.DISABLE if gpu else overflow.ENABLE
                ),
            )


def _constants_as_initializers(model: Any) -> Any:
    """NNCF's ONNX backend does not see the values of Constant nodes. Changed in place."""
    nodes = [node for node in model.graph.node if node.op_type == "Constant"]
    for node in nodes:
        value = next(a.t for a in node.attribute if a.name == "value")
        value.name = node.output[0]
        model.graph.initializer.append(value)
        model.graph.node.remove(node)
    return model


def _make_signed(model: Any) -> None:
    """Convert never-negative activations from uint8 to int8, the only kind that TensorRT supports:
    the same range in half as many steps. Changes the model in place."""
    from onnx import TensorProto, numpy_helper

    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    unsigned: dict[str, str] = {}  # scale -> zero point
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = node.input[1:3]
            if numpy_helper.to_array(arrays[zero]).dtype == np.uint8:
                unsigned[scale] = zero
    for name in unsigned:
        wider = numpy_helper.to_array(arrays[name]) * np.float32(255 / 127)
        arrays[name].CopyFrom(numpy_helper.from_array(wider, name))
    for name in set(unsigned.values()):
        zeros = np.zeros_like(numpy_helper.to_array(arrays[name]), np.int8)
        arrays[name].CopyFrom(numpy_helper.from_array(zeros, name))
    for info in model.graph.value_info:  # the graph's input stays uint8 and is not one of them
        if info.type.tensor_type.elem_type == TensorProto.UINT8:
            info.type.tensor_type.elem_type = TensorProto.INT8


def search(
    quantiser: Quantiser, judge: Judging, limit: float, say: Say, scheme: Scheme | None = None
) -> Quantised:
    """Return the recipe, and as many more groups in float32 as the verdict needs.

    Args:
        judge: what an artefact loses against float32, and whether that passes.
        limit: the most it may lose, in points; for the message.
        scheme: of the quantiser.

    Raises:
        Int8Refused: no choice that was tried passes; the message says how near.
    """
    groups, recipe = (GROUPS, RECIPE) if scheme is None else (scheme.groups, scheme.recipe)
    kept: tuple[str, ...] = recipe
    alone: dict[str, float] = {}
    trials: list[Trial] = []
    while True:
        artefact = quantiser.quantise(kept)
        found = judge.verdict(artefact)
        rounded = (round(x, 3) for x in (found.loss, found.low, found.high, found.agreement))
        trials.append(Trial(kept, *rounded))
        say(f"INT8 but {', '.join(kept)}: {found}")
        if found.passed:
            return Quantised(artefact, kept, found, tuple(trials), alone)
        left = [name for name in groups if name not in kept]
        if len(kept) == len(recipe) + _MOST or not left:
            break
        say("looking for the block that hurts most")
        beside = {}
        for name in left:
            beside[name] = round(judge.loss(quantiser.quantise((*kept, name), few=True)), 3)
            say(f"  with {name} in float32 too: {beside[name]:+.2f} points lost")
        alone = alone or beside
        kept = (*kept, min(left, key=beside.__getitem__))
    refused = refusal(found, limit, f"INT8, even with {', '.join(kept)} in float32,")
    refused.verdict, refused.trials = found, tuple(trials)
    raise refused


def refusal(found: Verdict, limit: float, what: str) -> Int8Refused:
    """Return the error for a verdict that did not pass: what is too large, and what would help."""
    if found.high <= limit:
        return Int8Refused(
            f"{what} finds other objects than fp32: {found.agreement:.1%} of the boxes with a "
            f"score from 0.5 agree (at least {found.agreement_low:.1%} with confidence), and "
            "model.min_agreement asks for more",
            hint="use `precision: fp32` or bf16, calibrate on more images, or lower "
            "model.min_agreement",
        )
    more = "" if found.loss > limit else "; it may be less, but these images do not show it"
    return Int8Refused(
        f"{what} loses {found.loss:.2f} points, and up to {found.high:.2f} with 95 % confidence: "
        f"more than the {limit:g} that model.max_loss allows{more}",
        hint=(
            "use `precision: fp32` or bf16, calibrate on more images, or raise model.max_loss"
            if found.loss > limit
            else "measure on more images (`--truth`), use `precision: fp32` or bf16, or raise "
            "model.max_loss"
        ),
    )

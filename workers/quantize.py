"""INT8 by post-training quantization with NNCF: most layers, but not those that measurably hurt.

The graph's convolutions form groups, the blocks of YOLO-NAS. The heads' last convolutions and all
that decodes boxes always stay in float32, as in the recipe that YOLO-NAS was published with; when
the loss is over the limit, the group whose return to float32 recovers most joins them, and so on.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import ArtefactError, ModelError
from workers.artefacts import Artefact
from workers.openvino_session import WEIGHTS, import_openvino

MODEL = "model.xml"
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
    "heads.stem": "/stem/",
    "heads.cls_convs": "/cls_convs/",
    "heads.reg_convs": "/reg_convs/",
    "heads.cls_pred": "/cls_pred(_[0-9]+)?/",
    "heads.reg_pred": "/reg_pred(_[0-9]+)?/",
}
RECIPE = ("heads.cls_pred", "heads.reg_pred")
_DECODING = "^/[^/]+$"  # normalisation, DFL, selection: operators of no module
_ROUNDS = 4  # groups that may be given back, beside the recipe's

Loss = Callable[[Artefact], float]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """One choice of groups kept in float32, and what it lost, in points."""

    kept: tuple[str, ...]
    loss: float


@dataclass(frozen=True, slots=True)
class Quantised:
    """The model that was chosen, and all that was tried."""

    artefact: Artefact
    kept: tuple[str, ...]
    loss: float
    trials: tuple[Trial, ...]


def import_nncf() -> Any:
    """The ``nncf`` module, silent and without its usage statistics. Raises ModelError."""
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


class Quantiser:
    """Quantises one graph, calibrated on one set of images, with any groups left out.

    Args:
        graph: ONNX in float32.
        images: uint8 [N, H, W, 3], letterboxed; never images that are measured on.
        folder: local, for the results.
    """

    def __init__(self, graph: Path, images: NDArray[np.uint8], folder: Path) -> None:
        self._nncf, self._ov = import_nncf(), import_openvino()
        self._graph, self._folder = graph, folder
        self._images = images
        self._made = 0

    def quantise(self, kept: Sequence[str]) -> Artefact:
        """INT8 but for the groups ``kept``: OpenVINO IR in a folder of its own."""
        nncf = self._nncf
        model = self._ov.Core().read_model(self._graph)
        data = nncf.Dataset(self._images, lambda image: {"images": image[None]})
        patterns = [f"^{GROUPS[name]}.*" for name in kept]
        with contextlib.redirect_stdout(io.StringIO()):
            quantised = nncf.quantize(
                model,
                data,
                subset_size=len(self._images),
                target_device=nncf.TargetDevice.CPU,
                ignored_scope=nncf.IgnoredScope(patterns=[*patterns, _DECODING], validate=False),
                # Symmetric weights, asymmetric activations where their range is.
                preset=nncf.QuantizationPreset.MIXED,
                # 7 bits where CPUs without VNNI would overflow, so that all of them agree.
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    overflow_fix=nncf.OverflowFix.ENABLE
                ),
            )
        self._made += 1
        folder = self._folder / f"int8-{self._made}"
        folder.mkdir()
        self._ov.save_model(quantised, folder / MODEL, compress_to_fp16=False)
        return Artefact({name: folder / name for name in (MODEL, WEIGHTS)}, MODEL, {})


def search(quantiser: Quantiser, loss: Loss, limit: float, say: Say) -> Quantised:
    """The recipe, and as many more groups in float32 as the limit needs.

    Args:
        loss: what an artefact loses against float32, in points.
        limit: the most it may lose.

    Raises:
        ArtefactError: no choice that was tried stays within the limit; the message says how near.
    """
    trials: list[Trial] = []

    def attempt(kept: tuple[str, ...]) -> tuple[float, Artefact]:
        artefact = quantiser.quantise(kept)
        lost = loss(artefact)
        trials.append(Trial(kept, lost))
        say(f"INT8 but {', '.join(kept)}: {lost:+.2f} points lost")
        return lost, artefact

    kept: tuple[str, ...] = RECIPE
    lost, artefact = attempt(kept)
    for _ in range(_ROUNDS):
        if lost <= limit:
            return Quantised(artefact, kept, lost, tuple(trials))
        tried = [(name, *attempt((*kept, name))) for name in GROUPS if name not in kept]
        best, best_lost, best_artefact = min(tried, key=lambda one: one[1])
        if best_lost >= lost:
            break
        kept, lost, artefact = (*kept, best), best_lost, best_artefact
    if lost <= limit:
        return Quantised(artefact, kept, lost, tuple(trials))
    raise ArtefactError(
        f"INT8 loses {lost:.2f} points, more than the {limit:g} that model.max_loss allows, even "
        f"with {', '.join(kept)} in float32",
        hint="use `precision: fp32` or bf16, calibrate on more images, or raise model.max_loss",
    )

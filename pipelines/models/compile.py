"""From a config to the artefact that its workers load: found where it lies, or made once.

    resolve the model ─> find the artefact by its key ─> export, compare, quantise, measure ─> put

``labelfleet compile`` does it by itself, ``labelfleet run`` on its way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig, load_config
from pipelines.config.source import check_places
from pipelines.models.artefact import NO_TRUTH, find_artefact, logged, with_artefact
from pipelines.models.graph import Say, exported_graph
from pipelines.models.int8 import Against, Judge
from pipelines.models.measure import refuse_unmeasured
from pipelines.models.sample_images import unseen
from pipelines.models.view import CompileSummary
from storage.coco.truth import read_truth
from storage.errors import ArtefactError
from workers.compile.quantize import refusal
from workers.runtimes.artefacts import Artefact, fetch_artefact
from workers.runtimes.choose import needs_artefact
from workers.spec import ModelSpec


def compile_model(
    config: RunConfig, *, cuda: bool, against: Against = NO_TRUTH, say: Say = logged
) -> CompileSummary:
    """Find or make the artefact of a config's model; with a truth, measure it in any case.

    Args:
        cuda: whether the workers have GPUs; the run's own record is what counts where there is one.
        against: what INT8's loss is measured against.
        say: told of each step, in a line for people.

    Raises:
        ArtefactError: as ``with_artefact``; or one that is there loses more on the truth than
            ``model.max_loss``.
        LabelfleetError: config, checkpoint, source or output cannot be used.
    """
    from pipelines.models.requested import requested_model

    spec = requested_model(config, cuda=cuda)
    before = spec.artefact
    if before is None and needs_artefact(spec):
        before = find_artefact(config, spec, against)
    spec = (
        replace(spec, artefact=before)
        if before
        else with_artefact(config, spec, say=say, against=against)
    )
    if spec.artefact is None:
        return CompileSummary(spec.runtime, spec.precision, None, None, {}, new=False)
    artefact = fetch_artefact(spec.artefact, config.storage.options())
    checked = None
    if before and against.truth is not None and spec.precision == "int8":
        checked = _check(config, spec, artefact, against, say)
    ref = spec.artefact
    return CompileSummary(
        spec.runtime, spec.precision, ref.url, ref.sha256, artefact.facts, not before, checked
    )


def _check(
    config: RunConfig, spec: ModelSpec, artefact: Artefact, against: Against, say: Say
) -> Mapping[str, Any]:
    """Return the figures of an INT8 model that was there already; refused when it loses too much.

    It may have been made without this ground truth: what it was calibrated on is left out.
    """
    truth, reference = against.truth, against.reference or spec
    assert truth is not None  # noqa: S101 - asked before
    others = unseen(truth, artefact.facts.get("calibration", {}).get("image_ids", ()))
    if not others.images:
        raise ArtefactError(
            f"the existing INT8 model was calibrated on all images of {truth.source}",
            hint="remove its folder, and compile again with this ground truth",
        )
    with tempfile.TemporaryDirectory(prefix="labelfleet-compile-") as work:
        graph = exported_graph(config, replace(reference, precision="fp32"), Path(work), say)
        judge = Judge.by_truth(config, spec, graph, others)
    refuse_unmeasured(judge.fp32_map, len(judge.inputs), judge.against, config.model.max_loss)
    found = judge.verdict(artefact)
    if not found.passed:
        raise refusal(
            found, config.model.max_loss, f"the INT8 model that is there, on {truth.source},"
        )
    return judge.figures(found)


def compile_from_file(
    path: str, overrides: tuple[str, ...], truth: str | None, say: Say = logged
) -> CompileSummary:
    """``labelfleet compile``: GPUs are those of this machine, unless ``workers.gpus: 0``."""
    config = load_config(path, overrides)
    check_places(config)
    options = config.storage.options()
    known = read_truth(truth, options) if truth else None
    cuda = config.workers.gpus != 0 and has_gpu()
    return compile_model(config, cuda=cuda, against=Against(known), say=say)


def has_gpu() -> bool:
    """Return whether torch sees a CUDA device here."""
    import torch

    return torch.cuda.is_available()

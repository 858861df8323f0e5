"""Find a model's artefact at its place, or make it there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.models.graph import Say, exported_graph, own_facts
from pipelines.models.int8 import Against, make_int8
from storage.objects.protocols import ObjectStore
from storage.stores.open import open_store
from storage.urls import normalise_url
from workers.compile.make_artefact import Made, artefact_key
from workers.runtimes.artefacts import find, publish
from workers.runtimes.choose import needs_artefact
from workers.spec import ArtefactRef, ModelSpec

FOLDER = "model"
NO_TRUTH = Against()

log = logging.getLogger("labelfleet")


def logged(text: str) -> None:
    """Log a step; the default for ``say``."""
    log.info("%s", text)


def with_artefact(
    config: RunConfig, spec: ModelSpec, *, say: Say = logged, against: Against = NO_TRUTH
) -> ModelSpec:
    """Return ``spec`` with the artefact that its runtime loads; torch needs none.

    Args:
        say: told of each step, in a line for people.
        against: what INT8's loss is measured against.

    Raises:
        ArtefactError: it does not agree with torch, or loses more than ``model.max_loss``.
        LabelfleetError: checkpoint, source or output cannot be used.
    """
    if not needs_artefact(spec):
        return spec
    ref = find_artefact(config, spec, against)
    if ref is None:
        store, prefix = artefact_place(config)
        folder = f"{prefix}{artefact_key(spec, _more(config, spec, against))}"
        with tempfile.TemporaryDirectory(prefix="labelfleet-compile-") as work:
            made = _make(config, spec, against, Path(work), say)
            ref = publish(store, folder, made.files, made.main, made.facts)
        say(f"artefact: {ref.url}")
    return replace(spec, artefact=ref)


def find_artefact(
    config: RunConfig, spec: ModelSpec, against: Against = NO_TRUTH
) -> ArtefactRef | None:
    """Return the model's artefact if it is at its place, else None."""
    store, prefix = artefact_place(config)
    return find(store, f"{prefix}{artefact_key(spec, _more(config, spec, against))}")


def artefact_place(config: RunConfig) -> tuple[ObjectStore, str]:
    """Return the store that holds artefacts, and what their keys begin with."""
    options = config.storage.options()
    if config.model.artefacts is not None:
        return open_store(config.model.artefacts, options), ""
    return open_store(config.output, options), f"{FOLDER}/"


def _more(config: RunConfig, spec: ModelSpec, against: Against) -> Mapping[str, Any]:
    """Return what an INT8 model depends on besides the network: its images and its limits."""
    if spec.precision != "int8":
        return {}
    part = config.source
    return {
        "source": [normalise_url(part.url), part.kind, part.include, part.exclude, part.keys],
        "max_loss": config.model.max_loss,
        "min_agreement": config.model.min_agreement,
        **({} if against.reference is None else {"reference": against.reference.sha256}),
    }


def _make(config: RunConfig, spec: ModelSpec, against: Against, work: Path, say: Say) -> Made:
    if spec.precision == "int8":
        return make_int8(config, spec, against, work, say)
    artefact = exported_graph(config, spec, work, say)
    return Made(artefact.files, artefact.main, own_facts(artefact.facts))

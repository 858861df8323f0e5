"""The exported graph of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.config.run_config import RunConfig
from pipelines.models.sample_images import sample
from storage.errors import ArtefactError
from storage.stores.open import open_store
from workers.checkpoints.cache import private_folder
from workers.compile.make_artefact import artefact_key, make_graph
from workers.local_folders import cache_folder
from workers.runtimes.artefacts import Artefact, fetch_artefact, find, publish
from workers.spec import ModelSpec

Say = Callable[[str], None]


def own_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the specification without what publishing adds."""
    return {k: v for k, v in facts.items() if k not in ("format", "main", "files")}


def exported_graph(config: RunConfig, spec: ModelSpec, work: Path, say: Say) -> Artefact:
    """Return the exported graph, from this user's cache or made now."""
    cache, folder = private_folder(cache_folder() / "artefacts"), artefact_key(spec)
    local, options = open_store(str(cache)), config.storage.options()
    if (ref := find(local, folder)) is not None:
        try:
            return fetch_artefact(ref, options)
        except ArtefactError:
            say("the cached graph is damaged; exporting it again")
            shutil.rmtree(cache / folder)
    few = sample(config, spec.preprocessing, 4)
    made = make_graph(spec, options, few.pixels, work, say)
    return fetch_artefact(publish(local, folder, made.files, made.main, made.facts), options)

"""Check that this node, which may have joined late, sees a run's folders."""

from __future__ import annotations

from pathlib import Path

from storage.errors import ConfigError
from storage.runs.manifest import RUN_KEY
from storage.urls import parse_url
from workers.spec import WorkerSpec


def check_folders(spec: WorkerSpec) -> None:
    """Refuse a node that would create an output of its own or find no image.

    Raises:
        ConfigError: the output is a folder that holds no such run here, or the source is a folder
            that is not here.
    """
    for url, witness in ((spec.output_url, RUN_KEY), (spec.source_url, "")):
        place = parse_url(url)
        if place.scheme == "file" and not Path(place.path, witness).exists():
            raise ConfigError(
                f"{place.path} is not the same folder on every node of the cluster",
                hint="use s3:// or another shared store when a run spans several machines",
            )

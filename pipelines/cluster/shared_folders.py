"""Check that every node sees the folders that a run needs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from storage.errors import ConfigError
from storage.urls import parse_url


def check_shared_folders(source: str, output: str) -> None:
    """Refuse a folder that any node of the cluster cannot see.

    Args:
        source, output: normalised URLs; those other than file:// are skipped. The
            output exists already; a file is put there for a moment. The source is only looked for.

    Raises:
        ConfigError: naming the folder and the nodes that lack it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray has none
    if len(nodes) == 1:
        return
    if source.startswith("file:"):
        _refuse_blind(parse_url(source).path, nodes, parse_url(source).path)
    if output.startswith("file:"):
        folder = parse_url(output).path
        with tempfile.NamedTemporaryFile(prefix=".labelfleet-tmp-", dir=folder) as probe:
            _refuse_blind(folder, nodes, probe.name)


def _refuse_blind(folder: str, nodes: Sequence[dict[str, Any]], probe: str) -> None:
    blind = _nodes_without(probe, nodes)
    if blind:
        raise ConfigError(
            f"{folder} is not the same folder on {', '.join(blind)}",
            hint="use s3:// or another shared store when a run spans several machines",
        )


def _nodes_without(path: str, nodes: Sequence[dict[str, Any]]) -> list[str]:
    look: Any = ray.remote(num_cpus=0)(_sees)
    asked = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(path)
        for node in nodes
    }
    return [address for address, answer in asked.items() if not ray.get(answer)]


def _sees(path: str) -> bool:
    return Path(path).exists()

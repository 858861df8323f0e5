"""The number of actors and each one's share, from the config and the machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from pipelines.config.run_config import WorkersConfig
from storage.errors import ConfigError

CORES_PER_CPU_ACTOR = 4  # measured: more threads per actor scale badly, fewer cost memory
DECODERS_MAX = 8
AWAITED_CPUS = 4  # an actor's cores, unless configured, while the cluster has no node yet


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster, as Ray sees it."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Sizing:
    """The pool's size and one worker's threads."""

    count: int
    gpus: float
    cpus: float
    torch_threads: int
    decode_threads: int
    batch_size: int
    batch_size_max: int | None = None
    nms_threads: int = 1


def wants_gpu(config: WorkersConfig, nodes: Sequence[Node]) -> bool:
    """Return whether the run labels on GPUs: if there are any, unless ``workers.gpus: 0``."""
    return config.gpus != 0 and (any(node.gpus > 0 for node in nodes) or awaited(config, nodes))


def awaited(config: WorkersConfig, nodes: Sequence[Node]) -> bool:
    """Return whether the run must start before the cluster has any node for it.

    That is so on an autoscaling cluster without a usable node yet, when the config states how
    many actors it wants and with how many GPUs.
    """
    said = config.count != "auto" and config.gpus != "auto"
    return said and all(node.cpus < 1 for node in nodes)


def size_pool(config: WorkersConfig, nodes: Sequence[Node], *, cuda: bool) -> Sizing:
    """Resolve every ``auto``.

    Args:
        config: the ``workers`` section.
        nodes: what the cluster has now.
        cuda: whether the run labels on GPUs.

    Raises:
        ConfigError: the requested actors fit on none of the nodes.
    """
    gpus = _gpus_per_actor(config, cuda)
    if awaited(config, nodes):
        cpus = float(AWAITED_CPUS if config.cpus == "auto" else config.cpus)
        fitting = 0
    else:
        hosts = _hosts(nodes, gpus)
        cpus = _cpus_per_actor(config, hosts, gpus)
        fitting = _fitting(hosts, gpus, cpus)
    count = fitting if config.count == "auto" else config.count
    if cuda:
        torch_threads, decoders = 1, max(2, min(DECODERS_MAX, int(cpus) - 1))
    else:
        # One decoder more than cores: each of them now and then waits for Python's lock.
        torch_threads, decoders = max(1, int(cpus)), max(1, min(4, int(cpus))) + 1
    nms = 2 if cuda else 1
    if config.batch_size == "auto":
        batch, most = batch_sizes(cuda=cuda)
        return Sizing(count, gpus, cpus, torch_threads, decoders, batch, most, nms)
    return Sizing(count, gpus, cpus, torch_threads, decoders, config.batch_size, None, nms)


def batch_sizes(*, cuda: bool) -> tuple[int, int]:
    """Return the batch size ``auto`` starts at, and the most a worker may raise it to.

    A worker halves its batches by itself where they do not fit the device's memory. On CPUs 16
    images were not reliably faster than 8, and took torch 320 MB more.
    """
    return (16, 64) if cuda else (4, 8)


def _fitting(hosts: Sequence[Node], gpus: float, cpus: float) -> int:
    """Count the actors that fit on these nodes. Raises ConfigError when none does."""
    fitting = sum(_actors_on(node, gpus, cpus) for node in hosts)
    if not fitting:
        most = max(node.cpus for node in hosts)
        raise ConfigError(
            f"workers.cpus: {cpus:g} cores an actor, but the largest node has {most:g}",
            hint="lower workers.cpus or leave it at auto",
        )
    return fitting


def wanted_actors(config: WorkersConfig, sizing: Sizing, nodes: Sequence[Node]) -> int:
    """Return the number of actors for the nodes that the cluster has now.

    With ``count: auto`` as many as fit, but never fewer than at the start: actors that do not fit
    stay pending, which an autoscaler sees.
    """
    if config.count != "auto":
        return config.count
    return max(sizing.count, sum(_actors_on(node, sizing.gpus, sizing.cpus) for node in nodes))


def _hosts(nodes: Sequence[Node], gpus: float) -> list[Node]:
    """Return the nodes with room for an actor's GPUs, or on CPUs for a core."""
    hosts = [node for node in nodes if (node.gpus >= gpus if gpus else node.cpus >= 1)]
    if all(node.cpus < 1 for node in nodes):
        raise ConfigError(
            "no node of the cluster has a CPU core yet, so the run cannot be sized",
            hint="set workers.count and workers.gpus (as in 16 and 1): then its "
            "autoscaler starts them; or start its worker nodes first",
        )
    if not hosts and gpus:
        most = max((node.gpus for node in nodes), default=0)
        raise ConfigError(
            f"workers.gpus: {gpus:g} for an actor, but no node has more than {most:g}",
            hint="lower workers.gpus, or set it to 0 to label on CPUs",
        )
    return hosts


def _gpus_per_actor(config: WorkersConfig, cuda: bool) -> float:
    if not cuda:
        if config.gpus not in ("auto", 0):
            raise ConfigError(
                f"workers.gpus is {config.gpus:g}, but the run labels on CPUs",
                hint="no node has a GPU, or the run was created without; set workers.gpus: 0",
            )
        return 0.0
    gpus = 1.0 if config.gpus == "auto" else float(config.gpus)
    if gpus > 1 and gpus % 1:
        raise ConfigError(
            f"workers.gpus: {gpus:g} cannot be allocated to an actor",
            hint="a share of one GPU (0.5), or a whole number",
        )
    return gpus


def _cpus_per_actor(config: WorkersConfig, hosts: Sequence[Node], gpus: float) -> float:
    if config.cpus != "auto":
        return float(config.cpus)
    if gpus:
        return max(1.0, min(node.cpus * gpus / node.gpus for node in hosts) // 1)
    if config.count != "auto":
        cores = sum(node.cpus for node in hosts)
        largest = max(node.cpus for node in hosts)
        return max(1.0, min(largest, cores / config.count // 1))
    return float(min(_even_share(node.cpus) for node in hosts))


def _even_share(cpus: float) -> int:
    """Return the cores per actor, at most CORES_PER_CPU_ACTOR, leaving few over: 6 is 2 x 3."""
    return int(cpus // ceil(cpus / CORES_PER_CPU_ACTOR))


def _actors_on(node: Node, gpus: float, cpus: float) -> int:
    by_cpu = int(node.cpus // cpus)
    if not gpus:
        return by_cpu
    # Ray splits one GPU among actors, but gives no actor parts of two.
    by_gpu = int(1 / gpus + 1e-6) * int(node.gpus) if gpus < 1 else int(node.gpus / gpus)
    return min(by_cpu, by_gpu)

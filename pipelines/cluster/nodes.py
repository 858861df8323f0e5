"""The cluster's nodes as they come and go: which are alive, which are about to leave.

Ray reports draining nodes through private calls only; all of them are in this module.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state as ray_state
from ray._private.worker import global_worker
from ray.core.generated import autoscaler_pb2

from pipelines.cluster.sizing import Node

log = logging.getLogger("labelfleet.nodes")

_EVERY_S = 2.0
_STOOD_STILL_S = 10.0


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """An alive node.

    Attributes:
        node_id: Ray's, hex.
        size: its resources for actors.
        leaving: it drains, on request or because it is being preempted.
        within_s: seconds until it goes; None: unknown.
    """

    node_id: str
    size: Node
    leaving: bool = False
    within_s: float | None = None


def alive_nodes() -> list[ClusterNode]:
    """Return the alive nodes of the cluster that this process is connected to."""
    draining = ray_state.state.get_draining_nodes()
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has none
    return [_node(node, draining) for node in found if node["Alive"]]


def _node(node: dict[str, Any], draining: dict[str, int]) -> ClusterNode:
    node_id, has = node["NodeID"], node["Resources"]
    size = Node(has.get("CPU", 0.0), has.get("GPU", 0.0))
    deadline_ms = draining.get(node_id)
    within_s = max(0.0, deadline_ms / 1000 - time.time()) if deadline_ms else None
    return ClusterNode(node_id, size, deadline_ms is not None, within_s)


def this_node() -> str:
    """Return the id of the node that this process is connected to."""
    return str(ray.get_runtime_context().get_node_id())


def announce_leaving(node_id: str, reason: str, within_s: float | None) -> None:
    """Tell Ray that a node is being preempted, so that no job places anything there."""
    deadline_ms = 0 if within_s is None else int((time.time() + within_s) * 1000)
    reasons: Any = autoscaler_pb2.DrainNodeReason  # type: ignore[attr-defined]  # generated
    preemption = reasons.Value("DRAIN_NODE_REASON_PREEMPTION")
    worker: Any = global_worker
    try:
        worker.gcs_client.drain_node(node_id, preemption, reason, deadline_ms)
    except Exception as exc:  # noqa: BLE001 - Ray's border: its shards are moved in any case
        log.warning("Ray could not be told that node %s is leaving: %s", node_id, exc)


class NodeWatch:
    """Lists the nodes every two seconds, in a thread of its own: a head that does not answer must
    not block the loop that has to notice it.

    Args:
        look: lists the nodes.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        look: Callable[[], list[ClusterNode]] = alive_nodes,
        *,
        every_s: float = _EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._every_s, self._clock = look, every_s, clock
        self.nodes: list[ClusterNode] | None = None  # a new list each time
        self._answered_s = self._asked_s = clock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="nodes")
        self._thread.start()

    def silent_s(self) -> float:
        """Return the seconds since Ray's head last answered, without time in which this process
        itself was stopped. Call it every second or so."""
        now_s = self._clock()
        if now_s - self._asked_s > _STOOD_STILL_S:
            self._answered_s = max(self._answered_s, now_s)
        self._asked_s = now_s
        return now_s - self._answered_s

    def close(self) -> None:
        """End the thread. One that waits for an answer is left: it is a daemon."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                self.nodes = self._look()
                self._answered_s = self._clock()
            except Exception as exc:  # noqa: BLE001 - a thread's border; silent_s tells
                log.debug("the nodes could not be listed: %s", exc)
            self._closed.wait(self._every_s)


def cluster_nodes() -> list[Node]:
    """Return the alive nodes of the cluster that this process is connected to."""
    return [
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray has none
        if node["Alive"]
    ]

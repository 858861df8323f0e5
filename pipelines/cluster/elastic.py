"""Elastic: keep the pool in step with a cluster whose nodes come and go during a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from pipelines.cluster.nodes import ClusterNode, NodeWatch, announce_leaving, this_node
from pipelines.cluster.sizing import Node
from storage.errors import RayLost

# Ray ends the driver silently this long after its head last answered: report it earlier.
_RAY_PATIENCE, _RAY_PATIENCE_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0


class Resizable(Protocol):
    """What Elastic needs of a LabelPool."""

    def places(self) -> dict[str, str]: ...

    def resize(self, count: int) -> None: ...

    def drain(self, worker: str, reason: str, within_s: float | None) -> None: ...

    def replace(self, worker: str, reason: str) -> None: ...


class Nodes(Protocol):
    """What Elastic needs of a NodeWatch."""

    nodes: list[ClusterNode] | None

    def silent_s(self) -> float: ...


class Elastic:
    """One run's view of its cluster. Used by the drive loop's thread.

    Args:
        pool: resized and drained.
        watch: lists the nodes.
        wanted: how many actors fit on these nodes.
        shards: how many the run has to label; there are never more actors than shards left.
        announce: tells the cluster that a node is leaving (its id, why, within how many seconds).
        home: the node this process is on; without it nothing can be placed.
    """

    def __init__(
        self,
        pool: Resizable,
        watch: Nodes,
        wanted: Callable[[Sequence[Node]], int],
        shards: int,
        *,
        announce: Callable[[str, str, float | None], None],
        home: str = "",
    ) -> None:
        self._pool, self._watch, self._wanted = pool, watch, wanted
        self._shards, self._announce, self._home = shards, announce, home
        patience_s = float(os.environ.get(_RAY_PATIENCE, _RAY_PATIENCE_S))
        self._silent_s = 0.5 * patience_s  # ending takes time, too: 12 s without an answer
        self._seen: list[ClusterNode] | None = None
        self._absent: set[str] = set()  # nodes of workers that the last look did not show
        self._announced: set[str] = set()

    def follow(self, ended: int) -> None:
        """Act on the latest list of nodes; cheap when it has not changed.

        Args:
            ended: shards that are done or set aside.

        Raises:
            RayLost: Ray's head no longer answers, or Ray died on this machine.
        """
        if self._watch.silent_s() > self._silent_s:
            raise _lost(f"the Ray cluster's head has not answered for {self._silent_s:.0f} s")
        nodes = self._watch.nodes
        if nodes is None or nodes is self._seen:
            return
        self._seen = nodes  # a look's own list: two looks may well show the same
        self._empty_leaving(nodes)
        self._replace_lost(nodes)
        staying = [node.size for node in nodes if not node.leaving]
        self._pool.resize(min(max(1, self._shards - ended), self._wanted(staying)))

    def leaving(self, worker: str, reason: str, within_s: float | None) -> None:
        """Pass a worker's notice that its node is going on to Ray, for every job on the cluster."""
        node_id = self._pool.places().get(worker)
        known = {node.node_id for node in self._seen or () if node.leaving} | self._announced
        if node_id and node_id not in known:
            self._announced.add(node_id)
            self._announce(node_id, reason, within_s)

    def _empty_leaving(self, nodes: Sequence[ClusterNode]) -> None:
        leaving = {node.node_id: node.within_s for node in nodes if node.leaving}
        for worker, node_id in self._pool.places().items() if leaving else ():
            if node_id in leaving:
                self._pool.drain(worker, "its node drains", leaving[node_id])

    def _replace_lost(self, nodes: Sequence[ClusterNode]) -> None:
        """Replace workers on nodes that have gone, in case Ray does not fail their calls."""
        alive = {node.node_id for node in nodes}
        if self._home in self._absent - alive:
            raise _lost("Ray's own process on this machine (its raylet) has died")
        places = self._pool.places()
        for worker, node_id in places.items():
            if node_id in self._absent and node_id not in alive:
                self._pool.replace(worker, "its node is gone")
        self._absent = {self._home, *places.values()} - alive - {""}


def _lost(message: str) -> RayLost:
    return RayLost(message, hint="what is committed stays; run the same command to continue")


@contextmanager
def elastic(
    pool: Resizable, wanted: Callable[[Sequence[Node]], int], shards: int
) -> Iterator[Elastic]:
    """Yield an Elastic on the cluster that this process is connected to."""
    watch = NodeWatch()
    try:
        yield Elastic(pool, watch, wanted, shards, announce=announce_leaving, home=this_node())
    finally:
        watch.close()

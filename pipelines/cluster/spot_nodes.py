"""AWS instances for Ray's autoscaler: spot of several types first, on demand last.

Ray asks its provider for one instance type at a time, and when EC2 has none of it asks for the
same one again (an allocation that fails lowers nothing; only one that times out does). So the
choices are made here, within one request: each type in every zone, then the next one, for what is
still missing.

``ray_cluster.yaml`` names this class as its provider; a worker's ``node_config`` then may hold

    Otherwise:                                   # changes to node_config, tried in this order
      - {InstanceType: g5.2xlarge}
      - {InstanceMarketOptions: null, AtMost: 4}  # null takes a key out: no spot, but on demand

``AtMost`` bounds how many instances of the cluster's workers may run on demand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

# EC2 lacks this type in this zone at the moment, or the account's quota for it is used up.
# Anything else (rights, a wrong subnet) would fail every choice alike, and should be seen.
_NONE_LEFT = frozenset({
    "InsufficientInstanceCapacity", "InsufficientHostCapacity", "InsufficientCapacity",
    "SpotMaxPriceTooLow", "MaxSpotInstanceCountExceeded", "VcpuLimitExceeded",
    "InstanceLimitExceeded", "Unsupported",
})  # fmt: skip

log = logging.getLogger(__name__)


def choices(node_config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Return the instance descriptions to try in turn, each with its AtMost."""
    first = {key: value for key, value in node_config.items() if key != "Otherwise"}
    yield first, None
    for change in node_config.get("Otherwise", ()):
        changed = {**first, **change}
        at_most = changed.pop("AtMost", None)
        yield {key: value for key, value in changed.items() if value is not None}, at_most


class SpotFirstNodeProvider(AWSNodeProvider):
    """Ray's AWS provider, with what ``Otherwise`` says."""

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Start up to ``count`` instances, fewer where EC2 lacks capacity; return them by id.

        Raises:
            NodeLaunchException: none could be had, or EC2 refused for another reason.
        """
        created: dict[str, Any] = {}
        refused: NodeLaunchException | None = None
        for description, at_most in choices(node_config):
            missing = count - len(created)
            if at_most is not None:
                missing = min(missing, at_most - self._on_demand())
            if missing <= 0:
                continue
            try:
                created |= super().create_node(description, tags, missing)
            except NodeLaunchException as exc:
                if exc.category not in _NONE_LEFT:
                    raise
                log.warning("no %s: %s", description.get("InstanceType"), exc.category)
                refused = exc
        if refused is not None and not created:
            raise refused
        return created

    def _on_demand(self) -> int:
        """Count the workers that run at the full price."""
        provider: Any = super()  # Ray has no types
        workers = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER})
        return sum(provider._get_cached_node(w).instance_lifecycle != "spot" for w in workers)

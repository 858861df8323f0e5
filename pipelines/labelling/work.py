"""Find what is left to label."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.config.run_config import RunConfig
from pipelines.labelling.open_run import OpenRun, refresh_listing
from pipelines.labelling.try_again import readable_again
from storage.records import Shard
from storage.runs.listing import Listing

log = logging.getLogger("labelfleet")


@dataclass(frozen=True, slots=True)
class Work:
    """The shards left to label, lazily; their number; and which of them come out of quarantine."""

    shards: Iterator[Shard]
    total: int
    last_chance: frozenset[str]


def find_work(
    run: OpenRun,
    config: RunConfig,
    limit: int | None,
    found: Callable[[int], None] = lambda shards: None,
    guard: Callable[[], None] = lambda: None,
) -> Work:
    """List the source again and return the live shards without a commit, quarantined ones last.

    Images that were missing when their shard was labelled, and can be read now, are among them.

    Args:
        limit: at most this many shards.
        found: called with the number of shards left, as far as it is known: from earlier listings
            first, then growing while the listing goes on. Not called where ``max_cost`` is set:
            workers that wait for a listing are paid for, and the limit could not count them.
        guard: called before the listing is committed; raises when the run's lock was lost.
    """
    early = config.max_cost is None
    guard()
    again = readable_again(run.manifest, run.source)
    committed = run.manifest.committed()
    at_most = math.inf if limit is None else limit
    earlier = Listing(run.manifest.store)
    left = sum(shard_id not in committed for shard_id in earlier.live_ids())
    if left and early:
        found(int(min(left, at_most)))

    def another(shard: Shard) -> None:
        nonlocal left
        left += shard.shard_id not in committed
        if early and 0 < left <= at_most:
            found(left)

    listing, change = refresh_listing(run, config, another, guard, again)
    log.info("listing %d: %d new shards", change.generation, change.shards_added)
    held_back = frozenset(run.manifest.quarantined_ids())
    left = sum(shard_id not in committed for shard_id in listing.live_ids())
    shards = shards_to_do(listing, committed, held_back)
    total = left if limit is None else min(left, limit)
    return Work(itertools.islice(shards, total), total, held_back)


def shards_to_do(
    listing: Listing, committed: set[str], held_back: frozenset[str]
) -> Iterator[Shard]:
    """Yield the live shards that are not committed, those in quarantine last."""
    for quarantined in (False, True):
        for shard in listing.live_shards(skip=committed) if held_back or not quarantined else ():
            if (shard.shard_id in held_back) == quarantined:
                yield shard

"""Put images that a person chose into the review queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.policy.choose import choose_policy
from pipelines.routing.cost import CostModel
from pipelines.routing.showing import ShowRule
from pipelines.routing.survey import Earlier
from storage.review.queue import QueueHead, Reason, ReviewItem, write_queue
from storage.runs.ledger import new_invocation
from storage.runs.lock import run_lock
from storage.runs.manifest import Manifest

MOST = 5_000
_NOTE = "chosen by hand"


@dataclass(frozen=True, slots=True)
class Sent:
    """How many images were queued, and how many were not since they are queued or answered."""

    queued: int
    known: int
    unreadable: int


def send_to_review(manifest: Manifest, rows: Sequence[Mapping[str, Any]]) -> Sent:
    """Queue images in the order given; ``labelfleet review push`` shows them to people.

    Args:
        manifest: the run; its lock is taken for a moment.
        rows: columns of the browser's ``images`` table.

    Raises:
        RunLocked: another process holds the run.
        ReviewError: another routing finished in the meantime.
    """
    with run_lock(manifest.store, "labelfleet browse"):
        earlier = Earlier.read(manifest)
        ready = [row for row in rows if row["status"] == "ok" and row["sha256"]]
        fresh = {row["sha256"]: row for row in ready if row["sha256"] not in earlier.sha256s}
        cost = CostModel()
        items = [_item(row, order, cost) for order, row in enumerate(fresh.values())]
        if items:
            last = list(earlier.heads.values())[-1:]
            head = QueueHead(
                invocation=new_invocation(),
                made_at=datetime.now(UTC).isoformat(timespec="seconds"),
                seed=0,
                budget=f"{len(items)} images",
                audit=0.0,
                cost=cost.to_fields(),
                policy=choose_policy(manifest, None, None, None).to_fields(),
                model_sha256=manifest.record.identity.model_sha256,
                # The audit's strata stand as they did: nothing here was drawn at random.
                strata=last[0].strata if last else (),
                frame="",
                passed_over={},
                show=ShowRule.choose("auto", cost).to_fields(),
            )
            write_queue(manifest.store, len(earlier.heads), head, items)
    return Sent(len(items), len(ready) - len(items), len(rows) - len(ready))


def _item(row: Mapping[str, Any], order: int, cost: CostModel) -> ReviewItem:
    return ReviewItem(
        image_id=row["image_id"],
        shard_id=row["shard_id"],
        offset=row["offset"],
        nbytes=row["nbytes"],
        sha256=row["sha256"],
        phash=row["phash"],
        width=row["width"],
        height=row["height"],
        order=order,
        part="value",
        show=True,
        stratum="",
        audit_rank=-1,
        inclusion=0.0,
        value=0.0,
        seconds=float(cost.seconds(row["boxes"], 0)),
        reasons=(Reason("chosen", 0.0, _NOTE),),
    )

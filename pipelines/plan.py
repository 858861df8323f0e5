"""What a run would do, and what is left of it. Reads listings, a few tars, the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.config import RunConfig
from pipelines.open_run import check_places, group_shards, listed_objects
from storage.errors import ConfigError, SourceTruncated
from storage.ledger import invocations, read_ledger
from storage.listing import Listing
from storage.manifest import Manifest
from storage.objects import open_store
from storage.records import Shard
from storage.shards import SupportsShards, read_shard

_SAMPLED_TARS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """Attributes ending in ``_left`` leave out what the run has committed already.

    Attributes:
        shards, images, gib: of the source as it is listed now.
        images_exact: False when the images in tars were estimated from a sample.
        images_per_s: of this run's own invocations, a worker; None before the first.
        hours_left, cost_left: None where there is no measured rate, or no price.
    """

    shards: int
    images: int
    gib: float
    images_exact: bool
    shards_left: int
    images_left: int
    gib_left: float
    images_per_s: float | None
    hours_left: float | None
    cost_left: float | None
    output: str
    output_exists: bool

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


@dataclass(slots=True)
class _Count:
    shards: int = 0
    loose: int = 0
    tars: int = 0
    nbytes: int = 0
    tar_nbytes: int = 0

    def add(self, shard: Shard) -> None:
        self.shards += 1
        self.nbytes += shard.nbytes
        if shard.kind == "tar":
            self.tars += 1
            self.tar_nbytes += shard.nbytes
        else:
            self.loose += len(shard.objects)


def plan_run(config: RunConfig) -> Plan:
    """Estimate a run.

    Raises:
        LabelfleetError: what would stop the run at its start: source, output.
    """
    check_places(config)
    options = config.storage.options()
    manifest = _existing(config)
    committed = manifest.committed() if manifest else set()
    everything, left, tars = _Count(), _Count(), list[Shard]()
    for shard in _shards(config, manifest):
        everything.add(shard)
        if shard.shard_id not in committed:
            left.add(shard)
        if shard.kind == "tar" and len(tars) < _SAMPLED_TARS:
            tars.append(shard)
    source = open_store(config.source.url, options)
    per_byte = _images_per_tar_byte(source, tars, config.max_image_bytes)
    images_left = left.loose + round(left.tar_nbytes * per_byte)
    rate = _measured_rate(manifest) if manifest else None
    hours = images_left / rate / 3600 if rate else None
    price = config.price_per_gpu_hour
    return Plan(
        shards=everything.shards,
        images=everything.loose + round(everything.tar_nbytes * per_byte),
        gib=everything.nbytes / 2**30,
        images_exact=everything.tars <= len(tars),
        shards_left=left.shards,
        images_left=images_left,
        gib_left=left.nbytes / 2**30,
        images_per_s=rate,
        hours_left=hours,
        cost_left=hours * price if hours is not None and price is not None else None,
        output=open_store(config.output, options).url,
        output_exists=manifest is not None,
    )


def _existing(config: RunConfig) -> Manifest | None:
    try:
        return Manifest.open(config.output, config.storage.options())
    except ConfigError:
        return None  # not created yet


def _shards(config: RunConfig, manifest: Manifest | None) -> Iterator[Shard]:
    """As the run would have them: what it listed stays as grouped, the rest is grouped anew."""
    listed = listed_objects(config)
    if manifest is None:
        yield from group_shards(listed, config.source.shard_size)
        return
    listing = Listing(manifest.store)
    known = {(o.key, o.nbytes, o.etag) for shard in listing.live_shards() for o in shard.objects}
    yield from listing.live_shards()
    fresh = (o for o in listed if (o.key, o.nbytes, o.etag) not in known)
    yield from group_shards(fresh, config.source.shard_size)


def _images_per_tar_byte(source: SupportsShards, tars: list[Shard], max_image_bytes: int) -> float:
    densities = [
        _count_images(source, tar, max_image_bytes) / tar.nbytes for tar in tars if tar.nbytes
    ]
    return mean(densities) if densities else 0.0


def _count_images(source: SupportsShards, tar: Shard, max_image_bytes: int) -> int:
    images = 0
    try:
        for _ in read_shard(source, tar, max_image_bytes=max_image_bytes):
            images += 1
    except SourceTruncated:
        pass  # the run will say so; what is readable counts
    return images


def _measured_rate(manifest: Manifest) -> float | None:
    """Images a second of the newest invocation that labelled anything, start-up left out."""
    for invocation in reversed(invocations(manifest.store)):
        shards = [e for e in read_ledger(manifest.store, invocation) if e.event == "shard"]
        if len(shards) > 1 and shards[-1].at > shards[0].at:
            images = sum(sum(e.counts.values()) for e in shards[1:])
            return images / (shards[-1].at - shards[0].at)
    return None


def render(plan: Plan) -> RenderableType:
    """For people."""
    table = Table(title="Plan", title_justify="left")
    for column in ("", "in the source", "left to do"):
        table.add_column(column, justify="left" if not column else "right")
    about = "" if plan.images_exact else "~"
    table.add_row("shards", f"{plan.shards:,}", f"{plan.shards_left:,}")
    table.add_row("images", f"{about}{plan.images:,}", f"{about}{plan.images_left:,}")
    table.add_row("GiB", f"{plan.gib:.2f}", f"{plan.gib_left:.2f}")
    table.add_row("hours", "", "?" if plan.hours_left is None else f"{plan.hours_left:.2f}")
    table.add_row("cost", "", "?" if plan.cost_left is None else f"{plan.cost_left:.2f}")
    remarks = [f"output: {plan.output} ({'exists' if plan.output_exists else 'new'})"]
    if plan.hours_left is None:
        remarks.append("hours: unknown until this run was measured; try `run --limit 2`, then plan")
    elif plan.cost_left is None:
        remarks.append("cost: set price_per_gpu_hour")
    return Group(table, *(Text(remark) for remark in remarks))

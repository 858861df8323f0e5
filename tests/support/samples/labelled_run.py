"""A run that the real engine labelled in this process: real images, rows, footers and ledger; the
detector sees brightness, without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice

from PIL import Image

from pipelines.config.source import group_shards
from pipelines.labelling.work import shards_to_do
from storage.objects.protocols import ObjectStore
from storage.records import ImageRecord, Shard
from storage.runs.ledger import LedgerEntry, LedgerWriter, new_invocation
from storage.runs.listing import Listing
from storage.runs.listing_changes import ListingDrop
from storage.runs.manifest import Manifest, RunRecord
from storage.shards.frames import frames_labelled
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source
from tests.support.ray.brightness import BrightnessDetector
from tests.support.samples.image_samples import encode, picture
from tests.support.samples.synthetic_run import record
from tests.support.samples.tar_samples import tar_of
from workers.images.frames import frames_of
from workers.labelling.labeller import ShardLabeller

CLASSES = ("dark", "bright")


def png(seed: int) -> bytes:
    """Some small picture."""
    return encode(Image.fromarray(picture(seed=seed)), "PNG")


def fill(source: ObjectStore, images: int = 6, tars: int = 2) -> None:
    """Loose images, and tars of three images of which the last one is broken."""
    for i in range(images):
        source.put(f"loose/{i:03}.png", png(i))
    for t in range(tars):
        members = [(f"{m}.png", png(1000 + 10 * t + m)) for m in range(2)]
        source.put(f"tars/{t:03}.tar", tar_of(*members, ("bad.png", b"no picture")))


def label(
    source: ObjectStore,
    output: ObjectStore,
    *,
    shard_size: int = 2,
    record_: RunRecord | None = None,
    only: int | None = None,
    check_drop: Callable[[ListingDrop], None] = lambda drop: None,
) -> Manifest:
    """List the source and label what has no commit yet, as one invocation.

    Args:
        record_: settings of the run; they also say how many frames of a file are labelled.
        only: label at most this many shards.
    """
    manifest = Manifest.create_or_continue(output, record_ or record(CLASSES, source.url))
    listing = Listing(output)
    listing.refresh(
        list_source(source),
        lambda objects: group_shards(objects, shard_size),
        check_drop=check_drop,
    )

    def read(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        return read_shard(source, shard, max_image_bytes=1 << 20, abort=abort, frames=frames)

    most = frames_labelled(manifest.record.inference)
    frames = frames_of(most, 1 << 20) if most else None
    invocation = new_invocation()
    ledger = LedgerWriter(output, invocation)
    labeller = ShardLabeller(BrightnessDetector(), read, manifest.commit, manifest.record.identity)
    try:
        to_do = shards_to_do(listing, manifest.committed(), frozenset())
        for shard in islice(to_do, only):
            footer = labeller.label(shard, f"{invocation}-{shard.shard_id}").footer
            ledger.write(
                LedgerEntry(
                    "shard", time.time(), shard.shard_id, footer.counts, footer.detections,
                    footer.seconds, {"worker": "here", "won": True},
                )
            )  # fmt: skip
        ledger.flush()
    finally:
        labeller.close()
    return manifest

"""List what a run labels: the source's objects after all filters, grouped into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from pipelines.config.files import refuse_below_a_file
from pipelines.config.keys import read_keys
from pipelines.config.run_config import RunConfig, SourceConfig
from storage.errors import ConfigError, SourceEmpty, SourceError, StorageError
from storage.objects.protocols import ObjectStore
from storage.records import (
    LINK_ETAG,
    SPECIAL_ETAG,
    Shard,
    StoredObject,
    printable,
)
from storage.runs.listing_changes import ListingDrop
from storage.shards.selecting import LeftOut, classify, group_images, list_source, tar_shards
from storage.stores.open import open_store
from storage.urls import normalise_url, overlaps, shown_url
from workers.images.signatures import format_of

_HEAD_NBYTES = 256  # of a file without a suffix


def check_places(config: RunConfig) -> None:
    """Refuse an output inside the source, around it, below a file, or in memory.

    Raises:
        ConfigError: naming both places.
    """
    for url in (config.source.url, config.output):
        if normalise_url(url).startswith("memory:"):
            raise ConfigError(
                f"{url} is in the memory of one process, where no worker can read it",
                hint="use a folder, s3://, gs:// or az://",
            )
    if overlaps(config.source.url, config.output):
        raise ConfigError(
            f"output {config.output} and source {config.source.url} overlap",
            hint="results below the source would be listed as images: choose an output beside it",
        )
    refuse_below_a_file("output", config.output)


def listed_objects(config: RunConfig, left_out: LeftOut | None = None) -> Iterator[StoredObject]:
    """Yield every object of the source to label, ordered by key.

    Args:
        left_out: counts what is passed over.

    Raises:
        SourceEmpty: the source has none.
        SourceError: more of ``source.keys`` than ``source.max_absent_keys`` are not there; raised
            at the end of the listing.
        StorageError: the source cannot be listed.
    """
    options = config.storage.options()
    source = open_store(config.source.url, options)
    part = config.source
    left = left_out or LeftOut()
    found = list_source(
        source,
        kind=part.kind,
        include=part.include,
        exclude=part.exclude,
        left_out=left,
        sniff=partial(_is_image, source) if part.sniff else lambda listed: False,
    )
    if part.keys is not None:
        found = _only(found, part, read_keys(part.keys, options), left)
    first = next(found, None)
    if first is None:
        what = {"tar": "tar shards", "images": "images", "auto": "images or tar shards"}[part.kind]
        raise SourceEmpty(
            f"no {what} at {source.url}"
            + (" that match include/exclude/keys" * _filtered(config))
            + (f"; there are {left}" if str(left) else "; there is nothing"),
            hint=_where_images_are(config, left),
        )
    yield first
    yield from found


def _where_images_are(config: RunConfig, left: LeftOut) -> str:
    """Return what to change in a config whose source has no image."""
    if left.counts["filtered"]:
        return "source.kind, include, exclude or keys leave them all out: check those"
    if not left.counts:
        return "nothing is there: put images or tars of images there, or correct the URL"
    return (
        "files are known as images by their suffix, or by their content where they have none "
        "(source.sniff); name the folder or prefix that holds the images"
    )


def _is_image(source: ObjectStore, listed: StoredObject) -> bool:
    if listed.etag in (LINK_ETAG, SPECIAL_ETAG) or not listed.nbytes:
        return False
    try:
        head = source.get_range(listed.key, 0, min(listed.nbytes, _HEAD_NBYTES))
    except StorageError:
        return False  # counted as a file without a suffix
    return format_of(head) is not None


def _only(
    found: Iterable[StoredObject], part: SourceConfig, wanted: frozenset[str], left: LeftOut
) -> Iterator[StoredObject]:
    absent = set(wanted)
    for listed in found:
        if listed.key in wanted:
            absent.discard(listed.key)
            yield listed
        else:
            left.note_filtered()
    left.note_absent(len(absent))
    if len(absent) > part.max_absent_keys * len(wanted) and len(absent) < len(wanted):
        examples = ", ".join(repr(printable(key)) for key in sorted(absent)[:3])
        raise SourceError(
            f"{len(absent):,} of {len(wanted):,} keys are not in the source, such as {examples}",
            hint="keys are paths below source.url and case matters; source.max_absent_keys says "
            "what share may be absent",
        )


def _filtered(config: RunConfig) -> bool:
    return bool(config.source.include or config.source.exclude or config.source.keys)


def check_drop(config: RunConfig, drop: ListingDrop) -> None:
    """Refuse a listing that lacks more of the source than ``source.max_drop``, or a whole folder.

    A failed mount or a prefix that temporarily cannot be listed looks like this.

    Raises SourceError.
    """
    allowed = config.source.max_drop
    if allowed >= 1 or not drop.deleted:
        return
    what = f"{drop.deleted:,} of {drop.known:,} objects that were listed before"
    if drop.folders:
        names = ", ".join(repr(f"{name}/") for name in drop.examples)
        more = f" and {drop.folders - len(drop.examples):,} more" * (
            drop.folders > len(drop.examples)
        )
        what = f"{what}, with everything in {names}{more},"
    elif drop.deleted <= allowed * drop.known:
        return
    raise SourceError(
        f"{what} are gone from {shown_url(config.source.url)}; nothing was changed",
        hint="check that the source is complete (mount, prefix, include/exclude/keys); if they "
        "were deleted on purpose, run again with --accept-drop",
    )


def group_shards(objects: Iterable[StoredObject], shard_size: int) -> Iterator[Shard]:
    """Yield tars as they are and loose images in groups, both in listing order."""
    loose: list[StoredObject] = []
    for listed in objects:
        if classify(listed.key) == "tar":
            yield from tar_shards([listed])
        else:
            loose.append(listed)
            if len(loose) == shard_size:
                yield from group_images(loose, shard_size)
                loose = []
    yield from group_images(loose, shard_size)

"""What a source holds: its objects told apart and grouped into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

from storage.objects.protocols import SupportsList
from storage.records import (
    Shard,
    StoredObject,
    shard_id_of,
)
from storage.shards.globs import compile_glob

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


Kind = Literal["tar", "image", "other"]


def classify(key: str) -> Kind:
    """Tell tar shard, image and everything else apart by the name alone, in any case.

    ``._photo.jpg`` and the like are macOS resource forks: other.
    """
    name = key.rsplit("/", 1)[-1].lower()
    if name.startswith("._"):
        return "other"
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    return "image" if name.endswith(IMAGE_SUFFIXES) else "other"


def list_source(
    store: SupportsList,
    *,
    kind: Literal["auto", "tar", "images"] = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Iterator[StoredObject]:
    """The objects of a source that can be labelled, in the listing's order, lazily.

    Args:
        kind: only tar shards, only loose images, or whatever is there.
        include: globs on the key, any of which must match; none: everything.
        exclude: globs on the key, none of which may match.

    In a glob ``*`` and ``?`` stay within one level, ``**`` crosses levels, ``[a-z]`` is a set;
    a glob without '/' is matched on the last part of the key, at any level. Case matters.
    """
    wanted = {"auto": ("tar", "image"), "tar": ("tar",), "images": ("image",)}[kind]
    included = [compile_glob(pattern) for pattern in include]
    excluded = [compile_glob(pattern) for pattern in exclude]
    for listed in store.list():
        if classify(listed.key) not in wanted:
            continue
        if included and not any(glob.fullmatch(listed.key) for glob in included):
            continue
        if not any(glob.fullmatch(listed.key) for glob in excluded):
            yield listed


def tar_shards(objects: Iterable[StoredObject]) -> Iterator[Shard]:
    """One shard for every tar among ``objects``; the others are passed over."""
    for listed in objects:
        if classify(listed.key) == "tar":
            yield Shard(shard_id_of([listed]), "tar", (listed,))


def group_images(objects: Iterable[StoredObject], shard_size: int) -> Iterator[Shard]:
    """Loose images in listing order, ``shard_size`` to a shard (fewer in the last).

    Tars among ``objects`` are passed over.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, not {shard_size}")
    images = (listed for listed in objects if classify(listed.key) == "image")
    while group := tuple(islice(images, shard_size)):
        yield Shard(shard_id_of(group), "images", group)

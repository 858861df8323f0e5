"""Select a source's objects by kind and group them into shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

from storage.objects.protocols import SupportsList
from storage.records import (
    FOLDER_LINK_ETAG,
    Shard,
    StoredObject,
    printable,
    shard_id_of,
)
from storage.shards.globs import compile_glob

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif",
    ".tiff", ".gif", ".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".jxl",
    ".pnm", ".pbm", ".pgm", ".ppm", ".psd", ".tga", ".dcm", ".dng", ".nef", ".nrw", ".cr2", ".cr3",
    ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw",
)  # fmt: skip


_REASONS = 50  # counted separately; keys are untrusted
_LONGEST_SUFFIX = 12

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


# Folders of thumbnails, resource forks and copies created by operating systems and programs.
SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", ".ipynb_checkpoints"})


Kind = Literal["tar", "image", "other"]


def classify(key: str) -> Kind:
    """Tell tar shard, image and everything else apart by the name alone, in any case.

    ``._photo.jpg`` and the like are macOS resource forks: other, like all in a SYSTEM_FOLDERS.
    """
    *folders, name = key.lower().split("/")
    if _is_system(folders, name):
        return "other"
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    return "image" if name.endswith(IMAGE_SUFFIXES) else "other"


def is_system(key: str) -> bool:
    """Return whether an operating system or program created the object."""
    *folders, name = key.lower().split("/")
    return _is_system(folders, name)


def _is_system(folders: list[str], name: str) -> bool:
    return name.startswith("._") or not SYSTEM_FOLDERS.isdisjoint(folders)


def suffix_of(key: str) -> str:
    """Return the lower-case suffix of a key's last part; '' if it has none."""
    stem, dot, suffix = key.lower().rpartition("/")[2].rpartition(".")
    return f".{suffix}" if dot and stem else ""


class LeftOut:
    """Counts the objects that a listing skips, by reason: a suffix, or why others are left out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, key: str) -> None:
        """Count an object that is neither image nor tar."""
        if is_system(key):
            reason = "system files"
        else:
            reason = suffix_of(key)[: _LONGEST_SUFFIX + 1] or "no suffix"
        if reason not in self.counts and len(self.counts) >= _REASONS:
            reason = "other suffixes"
        self.counts[reason] += 1

    def note_absent(self, keys: int) -> None:
        """Count keys that were asked for and are not in the source."""
        if keys:
            self.counts["keys that are not there"] += keys

    def note_filtered(self) -> None:
        """Count an image or tar that kind, include, exclude or keys leave out."""
        self.counts["filtered"] += 1

    def __str__(self) -> str:
        """For people: ``12 .json, 3 no suffix``; '' where nothing was left out."""
        return shown_counts(dict(self.counts.most_common()))


def shown_counts(left_out: Mapping[str, int]) -> str:
    """Format the counts of left-out objects by reason."""
    return ", ".join(f"{n:,} {printable(reason)}" for reason, n in left_out.items())


def list_source(
    store: SupportsList,
    *,
    kind: Literal["auto", "tar", "images"] = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    left_out: LeftOut | None = None,
    sniff: Callable[[StoredObject], bool] = lambda listed: False,
) -> Iterator[StoredObject]:
    """Yield the objects of a source that can be labelled, in the listing's order, lazily.

    Args:
        kind: only tar shards, only loose images, or whatever is there.
        include: globs on the key, any of which must match; none: everything.
        exclude: globs on the key, none of which may match.
        left_out: counts what is passed over.
        sniff: asked of objects without a suffix: whether their bytes are those of an image.

    A linked folder counts as an image, which cannot be read: what is in it is not passed over in
    silence.

    In a glob ``*`` and ``?`` stay within one level, ``**`` crosses levels, ``[a-z]`` is a set;
    a glob without '/' is matched on the last part of the key, at any level. Case matters.
    """
    wanted = {"auto": ("tar", "image"), "tar": ("tar",), "images": ("image",)}[kind]
    included = [compile_glob(pattern) for pattern in include]
    excluded = [compile_glob(pattern) for pattern in exclude]
    left = left_out or LeftOut()
    for listed in store.list():
        found = classify(listed.key)
        if found == "other" and not is_system(listed.key):
            is_image = listed.etag == FOLDER_LINK_ETAG or (
                not suffix_of(listed.key) and sniff(listed)
            )
            found = "image" if is_image else "other"
        if found == "other":
            left.note(listed.key)
        elif (
            found not in wanted
            or (included and not any(glob.fullmatch(listed.key) for glob in included))
            or any(glob.fullmatch(listed.key) for glob in excluded)
        ):
            left.note_filtered()
        else:
            yield listed


def tar_shards(objects: Iterable[StoredObject]) -> Iterator[Shard]:
    """Yield one shard per tar among ``objects``; skip all others."""
    for listed in objects:
        if classify(listed.key) == "tar":
            yield Shard(shard_id_of([listed]), "tar", (listed,))


def group_images(objects: Iterable[StoredObject], shard_size: int) -> Iterator[Shard]:
    """Yield shards of loose images in listing order, ``shard_size`` each (fewer in the last).

    Tars among ``objects`` are passed over; all others are images, whatever their names.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, not {shard_size}")
    images = (listed for listed in objects if classify(listed.key) != "tar")
    while group := tuple(islice(images, shard_size)):
        yield Shard(shard_id_of(group), "images", group)

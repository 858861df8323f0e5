"""Shards: which objects of a source are labelled, how they group, and the images inside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Protocol

from storage.errors import (
    AccessDenied,
    Interrupted,
    ObjectChanged,
    ObjectNotFound,
    ObjectUnreadable,
    StorageError,
)
from storage.objects.prefetch import READERS, in_order
from storage.objects.protocols import SupportsGet, SupportsStream
from storage.records import (
    FOLDER_LINK_ETAG,
    LINK_ETAG,
    SPECIAL_ETAG,
    ImageRecord,
    Shard,
    StoredObject,
    image_id_of,
    printable,
    tar_folders,
)
from storage.shards.frames import Frames
from storage.shards.selecting import classify
from storage.shards.tar_header import TarMember
from storage.shards.tar_stream import TarStream
from storage.urls import check_key

_NOT_FILES = {
    LINK_ETAG: "a symbolic link; links are not followed",
    FOLDER_LINK_ETAG: "a symbolic link to a folder; links are not followed, so nothing in it is "
    "labelled: give it as a source of its own, or mount it there",
    SPECIAL_ETAG: "a pipe, socket or device, not a plain file",
}


class SupportsShards(SupportsGet, SupportsStream, Protocol):
    """What reading a shard of either kind needs of a store."""


def read_shard(
    store: SupportsShards,
    shard: Shard,
    *,
    max_image_bytes: int,
    abort: Callable[[], bool] | None = None,
    readers: int = READERS,
    others_readable: Callable[[], bool] = lambda: False,
    frames: Frames | None = None,
) -> Iterator[ImageRecord]:
    """Yield the images of one shard, in order, in memory that does not grow with the shard.

    Args:
        store: where the shard lies.
        max_image_bytes: larger images become ``too_large`` records, unread.
        abort: asked between reads; Interrupted when it says yes.
        readers: threads that fetch loose images (object storage is slow per request but
            parallel), at most 64 MiB ahead of the consumer; a tar is one stream.
        others_readable: asked where access to an object is denied: whether other objects of the
            source can be read now, so that it is this object's trouble and no outage.
        frames: makes each page and animation frame a record; None: a file is one record.

    Every image is a record: a link or a sparse file in a tar, and a link in a folder, are
    ``unsupported``; a loose image that changed or vanished since the listing is ``missing``,
    and so is one that alone cannot be read; one whose key no store takes is ``unsupported``.

    Raises:
        SourceTruncated: after all readable records; commit them.
        SourceError: the tar is not a tar.
        ObjectUnreadable: access to the tar is denied, but not to other objects.
        ObjectNotFound, ObjectChanged: the tar as a whole is gone, or not the one listed.
        StorageError: the store failed.
        Interrupted: ``abort`` said yes.
    """
    if shard.kind == "tar":
        tar = _read_tar(store, shard.objects[0], max_image_bytes, abort, frames)
        return _naming_the_unreadable(tar, others_readable)
    fetch = partial(_image_record, store, max_image_bytes, others_readable)
    images = _read_images(fetch, shard.objects, max_image_bytes, abort, readers)
    return images if frames is None else _expanded(images, frames)


def _expanded(images: Iterator[ImageRecord], frames: Frames) -> Iterator[ImageRecord]:
    """Yield loose images with their further frames, as ``name#2`` and so on."""
    for record in images:
        yield from frames.expanded(record, partial("{}#{}".format, record.image_id))


def _read_tar(
    store: SupportsStream,
    tar: StoredObject,
    max_image_bytes: int,
    abort: Callable[[], bool] | None,
    frames: Frames | None,
) -> Iterator[ImageRecord]:
    names = _UniqueNames()
    archive, mark = printable(tar.key), tar_folders(tar.key)

    def unique_id(name: str, _number: int = 1) -> str:
        return f"{archive}/{names.unique(name)}{mark}"

    with store.stream(tar.key, if_match=tar.etag) as stream:
        members = TarStream(stream, name=tar.key, abort=abort)
        for member in members:
            name = printable(member.name)
            if classify(name) == "image" and member.kind != "directory":
                record = _member_record(members, member, unique_id(name), max_image_bytes)
                if frames is None:
                    yield record
                else:
                    yield from frames.expanded(record, partial(unique_id, name))


def _naming_the_unreadable(
    records: Iterator[ImageRecord], others_readable: Callable[[], bool]
) -> Iterator[ImageRecord]:
    try:
        yield from records
    except AccessDenied as exc:
        if not others_readable():
            raise
        raise ObjectUnreadable(exc.message, hint=exc.hint) from exc


def _member_record(
    members: TarStream, member: TarMember, image_id: str, max_image_bytes: int
) -> ImageRecord:
    offset = None if members.compressed else member.offset
    if member.kind != "file":
        return ImageRecord(image_id, None, 0, None, "unsupported", _not_a_file(member))
    if member.nbytes > max_image_bytes:
        members.skip_body(member)
        return _too_large(image_id, offset, member.nbytes, max_image_bytes)
    return ImageRecord(image_id, offset, member.nbytes, members.read_body(member))


def _not_a_file(member: TarMember) -> str:
    if member.kind in ("symlink", "hardlink"):
        return f"a {member.kind} to {printable(member.target)!r}; links are not followed"
    kind = "member of unknown type" if member.kind == "other" else f"{member.kind} member"
    return f"a {kind}, not a plain file"


def _too_large(image_id: str, offset: int | None, nbytes: int, limit: int) -> ImageRecord:
    error = f"{nbytes} bytes; this run takes images up to {limit}"
    return ImageRecord(image_id, offset, nbytes, None, "too_large", error)


class _UniqueNames:
    """Makes repeated image names unique: the second ``a.jpg`` becomes ``a.jpg#2``, be it another
    member or a further frame of the first.

    That can't be the name of another image, which ends in an image suffix, nor ``#1``, which is for
    loose images. Keeps 8 bytes of hash
    a name, since a shard may hold millions; two names that share a hash (one chance in 10^7 for
    a million members) merely number one of them without need.
    """

    def __init__(self) -> None:
        self._times: dict[bytes, int] = {}

    def unique(self, name: str) -> str:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        times = self._times.get(digest, 0) + 1
        self._times[digest] = times
        return name if times == 1 else f"{name}#{times}"


def _read_images(
    fetch: Callable[[StoredObject], ImageRecord],
    objects: Sequence[StoredObject],
    max_image_bytes: int,
    abort: Callable[[], bool] | None,
    readers: int,
) -> Iterator[ImageRecord]:
    def to_fetch(listed: StoredObject) -> int:
        return listed.nbytes if listed.nbytes <= max_image_bytes else 0

    records = in_order(objects, fetch, to_fetch, readers=readers)
    with closing(records):
        for record in records:
            if abort is not None and abort():
                raise Interrupted(f"stopped while reading the images from {objects[0].key}")
            yield record


def _image_record(
    store: SupportsGet,
    max_image_bytes: int,
    others_readable: Callable[[], bool],
    listed: StoredObject,
) -> ImageRecord:
    image_id = image_id_of(listed.key)
    try:
        check_key(listed.key)
    except StorageError as exc:
        return ImageRecord(image_id, None, listed.nbytes, None, "unsupported", exc.message)
    if listed.etag in _NOT_FILES:
        return ImageRecord(image_id, None, 0, None, "unsupported", _NOT_FILES[listed.etag])
    if listed.nbytes > max_image_bytes:
        return _too_large(image_id, 0, listed.nbytes, max_image_bytes)
    try:
        found = store.get(listed.key, if_match=listed.etag)
    except ObjectNotFound:
        error = "deleted since it was listed; the next run's listing drops it"
        return ImageRecord(image_id, 0, listed.nbytes, None, "missing", error)
    except ObjectChanged:
        error = "changed since it was listed; the next run's listing picks it up"
        return ImageRecord(image_id, 0, listed.nbytes, None, "missing", error)
    except (AccessDenied, ObjectUnreadable) as exc:
        if isinstance(exc, AccessDenied) and not others_readable():
            raise
        error = printable(f"cannot be read: {exc.message}; a later run tries it again")
        return ImageRecord(image_id, 0, listed.nbytes, None, "missing", error)
    return ImageRecord(image_id, 0, len(found), found)

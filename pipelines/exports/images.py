"""The images of an export: copied out of their shards, linked, or only named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa

from pipelines.exports.file_names import FileNames
from pipelines.exports.upright import copied_name, upright
from storage.errors import ConfigError, LabelfleetError, ObjectChanged, ObjectNotFound
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import ImageRef, StoredObject, image_ids_of
from storage.runs.image_bytes import read_images, read_labelled
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.shards.frames import file_id, frames_labelled, is_numbered
from storage.stores.open import open_store
from storage.urls import parse_url
from workers.images.preprocessing import recorded_range

ImageMode = Literal["copy", "link", "none"]
_PLACE = [field.name for field in fields(ImageRef)]
Found = bytes | Path | None | Exception


@dataclass(frozen=True, slots=True)
class _LinkedFile:
    """A loose image of a local source, as it was listed."""

    path: Path
    listed: StoredObject


class Images:
    """Gives rows their file names and, as the mode says, their bytes or the file to link to.

    Attributes:
        turned: images that were written anew, upright and in a format that every reader knows.
        kept: images that an earlier attempt had copied.
    """

    def __init__(
        self,
        manifest: Manifest,
        mode: ImageMode,
        source: ObjectStore | None,
        *,
        flat: bool,
        there: Callable[[str], bool] | None = None,
    ) -> None:
        self._manifest, self._mode, self._source = manifest, mode, source
        self._names = FileNames(flat=flat)
        self._files = _local_files(manifest) if mode == "link" else {}
        self._there = there
        self._framed = bool(frames_labelled(manifest.record.inference))
        self.turned = self.kept = 0

    def of(self, table: pa.Table) -> Iterator[tuple[int, str, Found]]:
        """Yield the place of every row with its image's name, and the image or why it has none.

        Names are given in the order of ``table``; copied images come in no particular order.

        Args:
            table: with the columns of ``ImageRef``.
        """
        ids = table.column("image_id").to_pylist()
        names = [self._names.name(self._suffixed(image_id)) for image_id in ids]
        if self._mode == "none":
            yield from ((at, name, None) for at, name in enumerate(names))
            return
        rows = [ImageRef(**row) for row in table.select(_PLACE).to_pylist()]
        if self._mode == "copy" and self._source is not None:
            yield from self._copied(rows, names, self._source)
            return
        for at, (row, name) in enumerate(zip(rows, names, strict=True)):
            yield at, name, self._link(row)

    def _copied(
        self, rows: Sequence[ImageRef], names: Sequence[str], source: ObjectStore
    ) -> Iterator[tuple[int, str, Found]]:
        wanted = {(row.shard_id, row.image_id): at for at, row in enumerate(rows)}
        for at, (row, name) in enumerate(zip(rows, names, strict=True)):
            if self._there and self._there(name):
                self.kept += 1
                del wanted[row.shard_id, row.image_id]
                yield at, name, None
        left = [rows[at] for at in wanted.values()]
        # Of all shards at once: for each of them alone the whole listing would be read again.
        for row, found in read_images(self._manifest, source, left):
            at = wanted[row.shard_id, row.image_id]
            yield at, names[at], self._upright(row, found)

    def _suffixed(self, image_id: str) -> str:
        return copied_name(image_id, framed=self._framed) if self._mode == "copy" else image_id

    def _upright(self, row: ImageRef, found: bytes | LabelfleetError) -> bytes | LabelfleetError:
        if not isinstance(found, bytes):
            return found
        as_png = self._framed and is_numbered(row.image_id)
        try:
            value_range = recorded_range(self._manifest.record.inference)
            turned = upright(found, value_range, as_png=as_png)
        except LabelfleetError as exc:
            return exc
        self.turned += turned is not None and not as_png
        return found if turned is None else turned

    def _link(self, row: ImageRef) -> Path | Exception:
        if row.image_id not in self._files and file_id(row.image_id) in self._files:
            return ObjectNotFound(
                f"{row.image_id!r} is a frame of a file, which no link can show",
                hint="export with --images copy",
            )
        file = self._files.get(row.image_id)
        # The file or a folder above it may now be a link to anywhere; realpath resolves it.
        if (
            file is None
            or self._source is None
            or not file.path.is_file()
            or os.path.realpath(file.path) != str(file.path)
        ):
            return ObjectNotFound(f"{row.image_id!r} is no longer a file of the source")
        try:
            now = self._source.head(file.listed.key)
        except LabelfleetError as exc:
            return exc
        if (now.nbytes, now.etag) == (file.listed.nbytes, file.listed.etag):
            return file.path
        if now.nbytes == file.listed.nbytes == row.nbytes:  # only its time differs, perhaps
            try:
                read_labelled(self._source, file.listed, row)
                return file.path
            except LabelfleetError:
                pass
        return ObjectChanged(f"{row.image_id!r} is another file than the one that was labelled")


def check_images(
    manifest: Manifest, mode: ImageMode, dest: ObjectStore, *, options: StorageOptions | None
) -> None:
    """Refuse a mode that cannot work.

    Raises:
        ConfigError: no such mode, or ``link`` where either side is not local loose files.
    """
    if mode not in get_args(ImageMode):
        raise ConfigError(f"no way {mode!r} to export images", hint="one of copy, link, none")
    if mode != "link":
        return
    source = open_store(str(manifest.record.source["url"]), options).url
    for what, place in (("source", source), ("destination", dest.url)):
        if parse_url(place).scheme != "file":
            raise ConfigError(
                f"the {what} {place} is not a local folder, so there is nothing to link",
                hint="export with --images copy",
            )
    _local_files(manifest)


def open_images(
    manifest: Manifest,
    mode: ImageMode,
    *,
    flat: bool,
    options: StorageOptions | None,
    there: Callable[[str], bool] | None = None,
) -> Images:
    """Return the images of a run for an export that ``check_images`` allowed.

    Args:
        manifest, mode: the run; ``copy``, ``link`` or ``none``.
        flat: as ``FileNames`` has it.
        options: how to reach the source.
        there: whether an image of that name was copied by an earlier attempt; None: no.
    """
    url = str(manifest.record.source["url"])
    source = open_store(url, options) if mode != "none" else None
    return Images(manifest, mode, source, flat=flat, there=there)


def _local_files(manifest: Manifest) -> dict[str, _LinkedFile]:
    """Loose images of a local source by image id. Raises ConfigError when there is a tar."""
    root = local_root(str(manifest.record.source["url"]))
    files = {}
    for shard in Listing(manifest.store).live_shards():
        if shard.kind == "tar":
            raise ConfigError(
                f"images lie inside tar shards, such as {shard.key}: nothing can link to them",
                hint="export with --images copy",
            )
        for listed in shard.objects:
            path = Path(os.path.realpath(root)) / listed.key
            files.update(dict.fromkeys(image_ids_of(listed.key), _LinkedFile(path, listed)))
    return files


def local_root(url: str) -> Path:
    """Return the folder of a file:// URL or plain path."""
    return Path(parse_url(url).path)

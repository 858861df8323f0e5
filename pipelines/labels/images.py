"""An export's images: copied out of their shards, linked, or only named."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from pipelines.labels.file_names import FileNames
from storage.errors import ConfigError, ObjectNotFound
from storage.labels.rows import LabelRow
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import printable
from storage.runs.image_bytes import read_images
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.stores.local_files import open_folder
from storage.stores.open import open_store
from storage.urls import check_key, parse_url

ImageMode = Literal["copy", "link", "none"]
Found = bytes | Path | None | Exception


class Images:
    """Gives rows their file names and, as the mode says, their bytes or the file to link to."""

    def __init__(
        self, manifest: Manifest, mode: ImageMode, source: ObjectStore | None, *, flat: bool
    ) -> None:
        self._manifest, self._mode, self._source = manifest, mode, source
        self._names = FileNames(flat=flat)
        self._files = _local_files(manifest) if mode == "link" else {}

    def of(self, rows: Sequence[LabelRow]) -> Iterator[tuple[LabelRow, str, Found]]:
        """Every row with its name and its image, or with why the image cannot be had.

        Names are given in the order of ``rows``; what is copied comes in an order of its own.
        """
        names = {row.image_id: self._names.name(row.image_id) for row in rows}
        if self._source is not None:
            for row, found in read_images(self._manifest, self._source, rows):
                yield row, names[row.image_id], found
            return
        for row in rows:
            linked = self._link(row) if self._mode == "link" else None
            yield row, names[row.image_id], linked

    def _link(self, row: LabelRow) -> Path | Exception:
        file = self._files.get(row.image_id)
        # Where a link stands now, or one on the way, it may lead anywhere: realpath tells.
        if file is None or not file.is_file() or os.path.realpath(file) != str(file):
            return ObjectNotFound(f"{row.image_id!r} is no file of the source any more")
        return file


def open_images(
    manifest: Manifest,
    mode: ImageMode,
    dest: ObjectStore,
    *,
    flat: bool,
    options: StorageOptions | None,
) -> Images:
    """The images of a run for an export to ``dest``.

    Raises:
        ConfigError: no such mode, or ``link`` where either side is not local files.
    """
    if mode not in get_args(ImageMode):
        raise ConfigError(f"no way {mode!r} to export images", hint="one of copy, link, none")
    url = str(manifest.record.source["url"])
    if mode == "link":
        for what, place in (("source", open_store(url, options).url), ("destination", dest.url)):
            if parse_url(place).scheme != "file":
                raise ConfigError(
                    f"the {what} {place} is not a local folder, so there is nothing to link",
                    hint="export with --images copy",
                )
    source = open_store(url, options) if mode == "copy" else None
    return Images(manifest, mode, source, flat=flat)


def make_link(dest: ObjectStore, key: str, file: Path) -> None:
    """A symbolic link at ``key`` of a local store."""
    *folders, name = check_key(key).split("/")
    with open_folder(parse_url(dest.url).path, folders, create=True) as folder:
        os.symlink(file, name, dir_fd=folder)


def _local_files(manifest: Manifest) -> dict[str, Path]:
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
            files[printable(listed.key)] = Path(os.path.realpath(root)) / listed.key
    return files


def local_root(url: str) -> Path:
    """The folder of a file:// URL or plain path."""
    return Path(parse_url(url).path)

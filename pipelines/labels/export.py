"""Export a label version for trainers: ``labelfleet export RUN DEST --format coco|yolo|hf``.

Rows stream shard by shard. Images that nobody and nothing found an object in are exported too: an
empty image teaches what background is. Boxes to ignore go where the format has a place for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal, get_args

from pipelines.labels.formats import ExportedImage, Exporter
from pipelines.labels.images import ImageMode, Images, open_images
from storage.errors import BucketNotFound, ConfigError
from storage.labels.rows import LabelRow, label_rows
from storage.labels.versions import LabelVersion, read_label_tables, read_version
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from storage.urls import overlaps

ExportFormat = Literal["coco", "yolo", "hf"]


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        dest, format, version: where, how, of what.
        images: exported; ``empty`` of them without a label.
        labels, ignored: boxes.
        left_out: images whose bytes could not be had any more, and why for the first of them.
    """

    dest: str
    format: str
    version: str
    images: int
    empty: int
    labels: int
    ignored: int
    left_out: int
    first_problem: str | None = None

    def to_fields(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def export_version(
    manifest: Manifest,
    dest: str,
    format: ExportFormat,
    *,
    version: str | None = None,
    images: ImageMode = "none",
    options: StorageOptions | None = None,
) -> ExportSummary:
    """Write a label version in a trainer's format.

    Args:
        manifest: the run.
        dest: folder or URL; empty, and neither inside the run nor inside its source.
        format: ``coco``: annotations.json (official category ids; ignore boxes as crowds and in
            a list of their own). ``yolo``: images/, labels/, ignore/, data.yaml. ``hf``: Parquet
            with Hugging Face features (image, objects).
        version: None: the latest.
        images: ``copy`` them by ranged reads, ``link`` to local loose files, or ``none``.
        options: how to reach the source's and the destination's storage.

    Raises:
        ConfigError: no such version, format or mode; ``dest`` is not empty or overlaps; ``link``
            where there are no local files.
    """
    if format not in get_args(ExportFormat):
        raise ConfigError(f"no export format {format!r}", hint="one of coco, yolo, hf")
    lineage = read_version(manifest.store, version)
    store = open_store(dest, options)
    _refuse_place(manifest, dest, store)
    pictures = open_images(manifest, images, store, flat=format == "yolo", options=options)
    tally = _Tally()
    with _exporter(format, store, lineage) as exporter:
        for image in _exported(manifest, lineage, pictures, tally):
            exporter.add(image)
            tally.count(image.row)
        exporter.close()
    return ExportSummary(
        dest=store.url,
        format=format,
        version=lineage.version,
        images=tally.images,
        empty=tally.empty,
        labels=tally.labels,
        ignored=tally.ignored,
        left_out=tally.left_out,
        first_problem=tally.first_problem,
    )


@dataclass(slots=True)
class _Tally:
    images: int = 0
    empty: int = 0
    labels: int = 0
    ignored: int = 0
    left_out: int = 0
    first_problem: str | None = None

    def count(self, row: LabelRow) -> None:
        accepted = len(row.accepted)
        self.images += 1
        self.empty += accepted == 0
        self.labels += accepted
        self.ignored += len(row.labels) - accepted

    def leave_out(self, row: LabelRow, problem: Exception) -> None:
        self.left_out += 1
        self.first_problem = self.first_problem or f"{row.image_id!r}: {problem}"


def _exported(
    manifest: Manifest, lineage: LabelVersion, pictures: Images, tally: _Tally
) -> Iterator[ExportedImage]:
    tables = read_label_tables(manifest.store, lineage)
    rows = (row for table in tables for row in label_rows(table))
    for _, of_shard in groupby(rows, key=lambda row: row.shard_id):
        for row, name, found in pictures.of(list(of_shard)):
            if isinstance(found, Exception):
                tally.leave_out(row, found)
            elif isinstance(found, bytes):
                yield ExportedImage(row, name, raw=found)
            else:
                yield ExportedImage(row, name, link=found)


def _exporter(
    format: ExportFormat, store: ObjectStore, lineage: LabelVersion
) -> AbstractContextManager[Exporter]:
    # Each format is loaded only when it is asked for.
    if format == "coco":
        from pipelines.labels.coco import CocoExporter

        return CocoExporter(store, lineage)
    if format == "yolo":
        from pipelines.labels.yolo import YoloExporter

        return YoloExporter(store, lineage)
    from pipelines.labels.hugging_face import HfExporter

    return HfExporter(store, lineage)


def _refuse_place(manifest: Manifest, dest: str, store: ObjectStore) -> None:
    for what, url in (("run", manifest.url), ("source", str(manifest.record.source["url"]))):
        if overlaps(dest, url):
            raise ConfigError(
                f"the export's place {dest} overlaps the {what} {url}", hint="choose another place"
            )
    try:
        there = next(store.list(), None)
    except BucketNotFound:
        return  # a folder that does not exist yet is empty
    if there is not None:
        raise ConfigError(
            f"{dest} is not empty: it holds {there.key}",
            hint="an export never mixes with other files; choose an empty place",
        )

"""Export a label version for trainers: ``labelfleet export RUN DEST --format coco|yolo|hf``.

Rows stream shard by shard. Images without any object are exported too: an empty image teaches
what background is. Ignore boxes go where the format has a place for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from pipelines.exports.card import CARD, data_card
from pipelines.exports.formats import ExportedImages, Exporter, IgnoreBoxes
from pipelines.exports.images import ImageMode, Images, check_images, open_images
from pipelines.exports.place import ExportPlace, open_place
from storage.errors import ConfigError
from storage.labels.versions import LabelVersion, read_label_tables, read_version
from storage.objects.protocols import StorageOptions
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from storage.urls import shown_url

ExportFormat = Literal["coco", "yolo", "hf"]

_ROWS_AT_ONCE = 2_048
_BYTES_AT_ONCE = 16 * 1024 * 1024  # of copied images


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        dest, format, version: where, how, of what.
        images: exported; ``empty`` of them without a label.
        labels, ignored: boxes.
        left_out: images whose bytes could no longer be read.
        first_problem: why the first of them could not be read.
        turned_upright: copies whose pixels were turned as their EXIF orientation says.
        copied_before: copies that an earlier attempt had made.
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
    turned_upright: int = 0
    copied_before: int = 0

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export, and how.

    Attributes:
        format: ``coco``: annotations.json (official category ids; ignore boxes as crowds and in
            a separate list). ``yolo``: images/, labels/, ignore/, data.yaml. ``hf``: Parquet
            with Hugging Face features (image, objects).
        version: a label version; None: the latest.
        images: ``copy`` them by ranged reads, turning rotated ones upright; ``link`` to local
            loose files; or ``none``.
        ignore_boxes: ``in``: among the labels too (COCO: as crowds); ``out``: only in the
            separate list. None: in for COCO, out for the others.
    """

    format: ExportFormat
    version: str | None = None
    images: ImageMode = "none"
    ignore_boxes: IgnoreBoxes | None = None

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("export format", self.format, get_args(ExportFormat)),
            ("way to treat ignore boxes", self.ignore_boxes, (None, *get_args(IgnoreBoxes))),
        ):
            if value not in allowed:
                known = ", ".join(one for one in allowed if one)
                raise ConfigError(f"no {what} {value!r}", hint=f"one of {known}")

    @property
    def kept_boxes(self) -> IgnoreBoxes:
        """Where ignore boxes go, the format's default resolved."""
        return self.ignore_boxes or ("in" if self.format == "coco" else "out")


def export_version(
    manifest: Manifest, dest: str, request: ExportRequest, options: StorageOptions | None = None
) -> ExportSummary:
    """Write a label version in a trainer's format.

    Args:
        manifest: the run.
        dest: folder or URL, neither inside the run nor inside its source. It must be empty, or
            hold an interrupted attempt at this same export, which is then continued.
        request: what to export, and how.
        options: how to reach the source's and the destination's storage.

    Raises:
        ConfigError: no such version, format or mode; ``dest`` overlaps or holds anything else;
            ``link`` without local files.
    """
    lineage = read_version(manifest.store, request.version)
    store = open_store(dest, options)
    check_images(manifest, request.images, store, options=options)
    place = open_place(store, manifest, _identity(manifest, lineage, request))
    pictures = open_images(
        manifest,
        request.images,
        flat=request.format == "yolo",
        options=options,
        there=(lambda name: place.has(f"images/{name}")) if request.format != "hf" else None,
    )
    tally = _Tally([c.name for c in lineage.categories])
    with _exporter(request.format, place, lineage, request.kept_boxes) as exporter:
        for images in _exported(manifest, lineage, pictures, tally):
            exporter.add(images)
            tally.count(images.rows)
        exporter.close()
    summary = _summary(store.url, lineage, request, tally, pictures)
    _write_card(place, manifest, lineage, summary, tally)
    place.finish(summary.to_fields())
    return summary


def _identity(manifest: Manifest, lineage: LabelVersion, request: ExportRequest) -> dict[str, Any]:
    """Return what makes two exports the same one, so that the second continues the first."""
    return {
        "run": shown_url(manifest.url),
        "version": lineage.version,
        "attempt": lineage.attempt,
        "format": request.format,
        "images": request.images,
        "ignore_boxes": request.kept_boxes,
    }


def _summary(
    dest: str, lineage: LabelVersion, request: ExportRequest, tally: _Tally, pictures: Images
) -> ExportSummary:
    return ExportSummary(
        dest=dest,
        format=request.format,
        version=lineage.version,
        images=tally.images,
        empty=tally.empty,
        labels=tally.labels,
        ignored=tally.ignored,
        left_out=tally.left_out,
        first_problem=tally.first_problem,
        turned_upright=pictures.turned,
        copied_before=pictures.kept,
    )


def _write_card(
    place: ExportPlace,
    manifest: Manifest,
    lineage: LabelVersion,
    summary: ExportSummary,
    tally: _Tally,
) -> None:
    policy = manifest.store.get(f"{lineage.prefix}policy.yaml").decode()
    names = ("images", "empty", "labels", "ignored", "left_out", "turned_upright")
    counts = {name.replace("_", " "): getattr(summary, name) for name in names}
    card = data_card(lineage, summary.format, policy, counts, tally.by_class())
    place.write(CARD, card.encode())


@dataclass(slots=True)
class _Tally:
    names: list[str]
    images: int = 0
    empty: int = 0
    labels: int = 0
    ignored: int = 0
    left_out: int = 0
    first_problem: str | None = None
    classes: Counter[int] = field(default_factory=Counter)

    def by_class(self) -> dict[str, int]:
        """Return the labels by class name."""
        return {name: self.classes[i] for i, name in enumerate(self.names)}

    def count(self, rows: pa.Table) -> None:
        labels = rows.column("labels").combine_chunks()
        box, ignored = labels.flatten(), np.asarray(labels.flatten().field("ignore"))
        image = np.repeat(np.arange(len(labels)), np.asarray(labels.value_lengths()))
        accepted = np.bincount(image[~ignored], minlength=len(labels))
        by_class = np.bincount(np.asarray(box.field("category_id"))[~ignored])
        self.classes.update(dict(enumerate(by_class.tolist())))
        self.images += len(labels)
        self.empty += int((accepted == 0).sum())
        self.labels += int(accepted.sum())
        self.ignored += int(ignored.sum())

    def leave_out(self, image_id: str, problem: Exception) -> None:
        self.left_out += 1
        self.first_problem = self.first_problem or f"{image_id!r}: {problem}"


def _exported(
    manifest: Manifest, lineage: LabelVersion, pictures: Images, tally: _Tally
) -> Iterator[ExportedImages]:
    for table in _tables(manifest, lineage):
        # Three lists: tuples that are kept make Python look for garbage among all there is.
        places, names, found_images = taken = _Taken([], [], [])
        nbytes = 0
        for at, name, found in pictures.of(table):
            if isinstance(found, Exception):
                tally.leave_out(table.column("image_id")[at].as_py(), found)
                continue
            places.append(at)
            names.append(name)
            found_images.append(found)
            nbytes += len(found) if isinstance(found, bytes) else 0
            if nbytes >= _BYTES_AT_ONCE:
                yield _images(table, taken)
                places, names, found_images = taken = _Taken([], [], [])
                nbytes = 0
        if places:
            yield _images(table, taken)


def _tables(manifest: Manifest, lineage: LabelVersion) -> Iterator[pa.Table]:
    """The version's rows, a few thousand at most at a time."""
    for read in read_label_tables(manifest.store, lineage, at_once=_ROWS_AT_ONCE):
        table = read.combine_chunks()
        for first in range(0, table.num_rows, _ROWS_AT_ONCE):
            yield table.slice(first, _ROWS_AT_ONCE)


class _Taken(NamedTuple):
    """Images of a table: their places in it, and what ``ExportedImages`` says of them."""

    places: list[int]
    names: list[str]
    pictures: list[bytes | Path | None]


def _images(table: pa.Table, taken: _Taken) -> ExportedImages:
    whole = taken.places == list(range(table.num_rows))
    rows = table if whole else table.take(pa.array(taken.places))
    return ExportedImages(rows, taken.names, taken.pictures)


def _exporter(
    format: ExportFormat, place: ExportPlace, lineage: LabelVersion, ignore_boxes: IgnoreBoxes
) -> AbstractContextManager[Exporter]:
    # Each format is loaded only when it is asked for.
    if format == "coco":
        from pipelines.exports.coco import CocoExporter

        return CocoExporter(place, lineage, ignore_boxes)
    if format == "yolo":
        from pipelines.exports.yolo import YoloExporter

        return YoloExporter(place, lineage, ignore_boxes)
    from pipelines.exports.hugging_face import HfExporter

    return HfExporter(place, lineage, ignore_boxes)

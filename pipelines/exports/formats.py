"""What every export format shares."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from pipelines.exports.place import ExportPlace
from storage.labels.rows import Label
from storage.labels.versions import LabelVersion

IgnoreBoxes = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class ExportedImages:
    """Some rows on their way out.

    Attributes:
        rows: the images' labels, in ``LABEL_SCHEMA``.
        names: the images' file names below the format's image folder.
        pictures: their bytes where they are to be copied, the file to link to, or None.
    """

    rows: pa.Table
    names: Sequence[str]
    pictures: Sequence[bytes | Path | None]


def place_pictures(place: ExportPlace, images: ExportedImages, folder: str = "images/") -> None:
    """Write or link the images of formats that keep them as files."""
    for name, picture in zip(images.names, images.pictures, strict=True):
        if picture is None:
            continue
        if isinstance(picture, bytes):
            place.write(f"{folder}{name}", picture)
        else:
            place.link(f"{folder}{name}", picture)


def split_labels(
    labels: Iterable[Label], ignore_boxes: IgnoreBoxes
) -> tuple[list[Label], list[Label]]:
    """Return the labels of an exported image, and separately its ignore boxes."""
    every = list(labels)
    kept = [label for label in every if ignore_boxes == "in" or not label.ignore]
    return kept, [label for label in every if label.ignore]


class Exporter(Protocol):
    """One format. ``close`` is called once, after the last image, and only without an error."""

    def add(self, images: ExportedImages) -> None: ...

    def close(self) -> None: ...


def provenance(lineage: LabelVersion) -> dict[str, Any]:
    """Return where exported labels come from, for the format's own description field."""
    guarantee = {"guarantee": lineage.guarantee} if lineage.guarantee else {}
    return {
        "description": f"{lineage.run['name']}, label version {lineage.version}, by labelfleet",
        **guarantee,
        "version": lineage.version,
        "date_created": lineage.created_at,
        "model_sha256": lineage.run["model_sha256"],
        "model_licence": lineage.run["licence"],
        "policy": lineage.policy,
        "counts": lineage.counts,
    }


def json_line(value: Any) -> bytes:
    """Return one line of JSON, any file name included."""
    return json.dumps(value).encode() + b"\n"

"""What every export format shares."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from storage.labels.rows import Label, LabelRow
from storage.labels.versions import LabelVersion

IgnoreBoxes = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class ExportedImage:
    """One row on its way out.

    Attributes:
        row: the image's labels.
        name: its file name below the format's image folder.
        raw: its bytes where they are to be copied, else None.
        link: the file to link to, else None.
    """

    row: LabelRow
    name: str
    raw: bytes | None = None
    link: Path | None = None


def split_labels(
    labels: Iterable[Label], ignore_boxes: IgnoreBoxes
) -> tuple[list[Label], list[Label]]:
    """Return the labels of an exported image, and separately its ignore boxes."""
    every = list(labels)
    kept = [label for label in every if ignore_boxes == "in" or not label.ignore]
    return kept, [label for label in every if label.ignore]


class Exporter(Protocol):
    """One format. ``close`` is called once, after the last image, and only without an error."""

    def add(self, image: ExportedImage) -> None: ...

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

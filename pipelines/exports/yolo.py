"""YOLO: images/, labels/<stem>.txt with normalised boxes, data.yaml; class ids are contiguous.

An empty image has an empty text file. The format has no place for boxes to ignore: they are in
ignore/<stem>.txt, in the same form, for trainers that mask them, and among the labels only where
that is asked for. names.jsonl says which image each file is. data.yaml has no ``path``: loaders
then take its own folder, wherever that is.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import yaml

from pipelines.exports.formats import (
    ExportedImages,
    IgnoreBoxes,
    json_line,
    place_pictures,
    provenance,
    split_labels,
)
from pipelines.exports.place import ExportPlace
from storage.labels.rows import Label, LabelRow, label_rows
from storage.labels.versions import LabelVersion
from storage.objects.os_errors import temporary_folder, translating_os_errors


class YoloExporter:
    """Writes one text file an image, and data.yaml at the end."""

    def __init__(
        self, place: ExportPlace, lineage: LabelVersion, ignore_boxes: IgnoreBoxes
    ) -> None:
        self._place, self._lineage, self._ignore_boxes = place, lineage, ignore_boxes

    def __enter__(self) -> YoloExporter:
        self._folder = temporary_folder()
        with translating_os_errors(self._folder.name):
            self._names = (Path(self._folder.name) / "names.jsonl").open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk; the folder is deleted next
            self._names.close()
        self._folder.cleanup()

    def add(self, images: ExportedImages) -> None:
        """Some images with their labels."""
        place_pictures(self._place, images)
        for name, row in zip(images.names, label_rows(images.rows), strict=True):
            self._add(name, row)

    def _add(self, name: str, row: LabelRow) -> None:
        stem = name.rsplit(".", 1)[0]
        kept, ignored = split_labels(row.labels, self._ignore_boxes)
        self._place.write(f"labels/{stem}.txt", _lines(kept, row.width, row.height))
        if ignored:
            self._place.write(f"ignore/{stem}.txt", _lines(ignored, row.width, row.height))
        line = json_line({"file": name, "image_id": row.image_id, "sha256": row.sha256})
        with translating_os_errors(self._folder.name):
            self._names.write(line)

    def close(self) -> None:
        """data.yaml, last."""
        with translating_os_errors(self._folder.name):
            self._names.close()
        self._place.write("names.jsonl", Path(self._names.name))
        described = {
            "train": "images",
            "val": "images",
            "names": {c.id: c.name for c in self._lineage.categories},
            "labelfleet": provenance(self._lineage),
        }
        self._place.write("data.yaml", yaml.safe_dump(described, sort_keys=False).encode())


def _lines(labels: Iterable[Label], width: int, height: int) -> bytes:
    """``class cx cy w h`` a box, as shares of the upright image's width and height."""
    out = []
    for label in labels:
        x1, y1, x2, y2 = label.bbox
        cx, cy = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
        w, h = (x2 - x1) / width, (y2 - y1) / height
        out.append(f"{label.category_id} {cx:.6f} {cy:.6f} {w:.6f} {h:.6f}\n")
    return "".join(out).encode()

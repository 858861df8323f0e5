"""COCO JSON: official category ids, empty images kept, ignore boxes twice over.

Evaluators ignore crowds, so ignore boxes are annotations with ``iscrowd: 1`` (unless they are to be
left out); trainers drop crowds, after which the object would be background, so the same boxes are
also in a top-level list ``ignore`` that a trainer can mask out. Each annotation has its box as a
polygon: pycocotools and several viewers fail without a ``segmentation``, or with an empty one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.exports.formats import ExportedImage, IgnoreBoxes, provenance, split_labels
from pipelines.exports.place import ExportPlace
from storage.labels.rows import Label
from storage.labels.versions import LabelVersion

ANNOTATIONS = "annotations.json"
IMAGES = "images/"


class CocoExporter:
    """Writes images/ and annotations.json. The JSON is spooled: memory does not grow."""

    def __init__(
        self, place: ExportPlace, lineage: LabelVersion, ignore_boxes: IgnoreBoxes
    ) -> None:
        self._place, self._lineage, self._ignore_boxes = place, lineage, ignore_boxes
        self._official = [c.official_id for c in lineage.categories]
        self._images = self._annotations = self._ignored = 0

    def __enter__(self) -> CocoExporter:
        self._folder = tempfile.TemporaryDirectory(prefix="labelfleet-")
        self._lists = {name: (self._path(name)).open("w") for name in ("images", "annotations",
                                                                       "ignore")}  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._lists.values():
            file.close()
        self._folder.cleanup()

    def add(self, image: ExportedImage) -> None:
        """One image with its labels."""
        row = image.row
        if image.raw is not None:
            self._place.write(f"{IMAGES}{image.name}", image.raw)
        elif image.link is not None:
            self._place.link(f"{IMAGES}{image.name}", image.link)
        self._images += 1
        entry = {
            "id": self._images,
            "file_name": image.name,
            "width": row.width,
            "height": row.height,
            "labelfleet": {
                "image_id": row.image_id,
                "sha256": row.sha256,
                "source": row.source,
                "annotator": row.annotator,
                "labelled_at": row.labelled_at.isoformat(),
            },
        }
        self._write("images", self._images, entry)
        kept, ignored = split_labels(row.labels, self._ignore_boxes)
        for label in kept:
            self._annotations += 1
            annotation = self._annotation(label, self._annotations)
            self._write("annotations", self._annotations, annotation | _outline(annotation))
        for label in ignored:
            self._ignored += 1
            self._write("ignore", self._ignored, self._annotation(label, self._ignored))

    def close(self) -> None:
        """Put the lists together as annotations.json."""
        categories = [
            {"id": c.official_id, "name": c.name, "supercategory": ""}
            for c in self._lineage.categories
        ]
        whole = self._path("whole")
        with whole.open("w") as out:
            out.write('{"info": ' + json.dumps(provenance(self._lineage)))
            out.write(',\n"categories": ' + json.dumps(categories))
            for name, file in self._lists.items():
                file.close()
                out.write(f',\n"{name}": [\n')
                with self._path(name).open() as lines:
                    for line in lines:
                        out.write(line)
                out.write("\n]")
            out.write("}\n")
        self._place.write(ANNOTATIONS, whole)

    def _annotation(self, label: Label, number: int) -> dict[str, Any]:
        x1, y1, x2, y2 = (round(float(v), 3) for v in label.bbox)
        width, height = round(x2 - x1, 3), round(y2 - y1, 3)
        made = {
            "id": number,
            "image_id": self._images,
            "category_id": self._official[label.category_id],
            "bbox": [x1, y1, width, height],
            "area": round(width * height, 3),
            "iscrowd": int(label.ignore),
            "origin": label.origin,
        }
        return made if label.score is None else {**made, "score": round(label.score, 6)}

    def _write(self, name: str, count: int, entry: dict[str, Any]) -> None:
        self._lists[name].write(("" if count == 1 else ",\n") + json.dumps(entry))

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.json"


def _outline(annotation: dict[str, Any]) -> dict[str, Any]:
    """Return the box as a polygon, clockwise from the top left."""
    x, y, w, h = annotation["bbox"]
    right, bottom = round(x + w, 3), round(y + h, 3)
    return {"segmentation": [[x, y, right, y, right, bottom, x, bottom]]}

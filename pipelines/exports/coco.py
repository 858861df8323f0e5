"""COCO JSON: official category ids, empty images kept, ignore boxes twice over.

Evaluators ignore crowds, so ignore boxes are annotations with ``iscrowd: 1`` (unless they are to be
left out); trainers drop crowds, after which the object would be background, so the same boxes are
also in a top-level list ``ignore`` that a trainer can mask out. Each annotation has its box as a
polygon: pycocotools and several viewers fail without a ``segmentation``, or with an empty one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.exports.formats import ExportedImages, IgnoreBoxes, place_pictures, provenance
from pipelines.exports.place import ExportPlace
from storage.coco.json_text import floats, rounded, strings, text_of
from storage.labels.versions import LabelVersion

ANNOTATIONS = "annotations.json"

_COPIED = ("image_id", "sha256", "source", "annotator", "labelled_at", "width", "height")
_LISTS = ("images", "annotations", "ignore")
_DIVIDED = ",\n"
_BOXES_AT_ONCE = 1 << 16


class CocoExporter:
    """Writes images/ and annotations.json. The JSON is spooled: memory does not grow."""

    def __init__(
        self, place: ExportPlace, lineage: LabelVersion, ignore_boxes: IgnoreBoxes
    ) -> None:
        self._place, self._lineage, self._ignore_boxes = place, lineage, ignore_boxes
        self._official = np.array([c.official_id for c in lineage.categories], np.int64)
        self._images = 0
        self._count = dict.fromkeys(_LISTS, 0)

    def __enter__(self) -> CocoExporter:
        self._folder = tempfile.TemporaryDirectory(prefix="labelfleet-")
        self._lists = {name: self._path(name).open("wb") for name in _LISTS}
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

    def add(self, images: ExportedImages) -> None:
        """Some images with their labels."""
        place_pictures(self._place, images)
        n = images.rows.num_rows
        numbers = np.arange(self._images + 1, self._images + n + 1)
        self._write("images", _image_lines(images, numbers))
        labels = images.rows.column("labels").combine_chunks()
        box = labels.flatten()
        number = np.repeat(numbers, np.asarray(labels.value_lengths()))
        ignored = np.asarray(box.field("ignore"))
        kept = np.ones(len(ignored), np.bool_) if self._ignore_boxes == "in" else ~ignored
        for name, wanted in (("annotations", kept), ("ignore", ignored)):
            places = np.flatnonzero(wanted)
            for first in range(0, len(places), _BOXES_AT_ONCE):
                some = places[first : first + _BOXES_AT_ONCE]
                begin = self._count[name] + 1
                ids = np.arange(begin, begin + len(some))
                boxes = _Boxes(box.take(pa.array(some)), number[some], ids, self._official)
                self._write(name, boxes.lines(outlined=name == "annotations"))
        self._images += n

    def close(self) -> None:
        """Put the lists together as annotations.json."""
        categories = [
            {"id": c.official_id, "name": c.name, "supercategory": ""}
            for c in self._lineage.categories
        ]
        whole = self._path("whole")
        with whole.open("wb") as out:
            out.write(f'{{"info": {json.dumps(provenance(self._lineage))}'.encode())
            out.write(f',\n"categories": {json.dumps(categories)}'.encode())
            for name, file in self._lists.items():
                file.close()
                out.write(f',\n"{name}": [\n'.encode())
                with self._path(name).open("rb") as lines:
                    shutil.copyfileobj(lines, out)
                out.write(b"\n]")
            out.write(b"}\n")
        self._place.write(ANNOTATIONS, whole)

    def _write(self, name: str, lines: pa.Array) -> None:
        """Add lines, each of which begins with what divides it from the one before."""
        text = text_of(lines)
        first = self._count[name] == 0
        self._lists[name].write(text[len(_DIVIDED) :] if first else text)
        self._count[name] += len(lines)

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.json"


def _image_lines(images: ExportedImages, numbers: NDArray[np.int64]) -> pa.Array:
    column = {name: images.rows.column(name).combine_chunks() for name in _COPIED}
    times = column["labelled_at"].dictionary_encode()
    written = [f'"{time.isoformat()}"' for time in times.dictionary.to_pylist()]
    return _joined(
        _DIVIDED + '{"id": ', numbers,
        ', "file_name": ', strings(pa.array(images.names, pa.string())),
        ', "width": ', column["width"], ', "height": ', column["height"],
        ', "labelfleet": {"image_id": ', strings(column["image_id"]),
        ', "sha256": ', strings(column["sha256"]),
        ', "source": ', strings(column["source"]),
        ', "annotator": ', strings(column["annotator"]),
        ', "labelled_at": ', pa.array(written, pa.string()).take(times.indices), "}}",
    )  # fmt: skip


class _Boxes:
    """N boxes of a version as annotations.

    Args:
        box: [N], in ``LABEL_TYPE``.
        image, ids: [N], the numbers of their images, and their own.
        official: official category ids by category id.
    """

    def __init__(
        self,
        box: pa.StructArray,
        image: NDArray[np.int64],
        ids: NDArray[np.int64],
        official: NDArray[np.int64],
    ) -> None:
        self._box, self._image, self._ids = box, image, ids
        self._category = official[np.asarray(box.field("category_id"))]
        corners = rounded(np.asarray(box.field("bbox").flatten()), 3).reshape(-1, 4)
        self._x1, self._y1, self._x2, self._y2 = corners.T

    def lines(self, *, outlined: bool) -> pa.Array:
        """Return the JSON of each, [N]; ``outlined``: with the box as a polygon, clockwise from
        the top left."""
        width, height = rounded(self._x2 - self._x1, 3), rounded(self._y2 - self._y1, 3)
        x, y = floats(self._x1), floats(self._y1)
        box = self._box
        parts = [
            _DIVIDED + '{"id": ', self._ids, ', "image_id": ', self._image,
            ', "category_id": ', self._category, ', "bbox": [', x, ", ", y, ", ", floats(width),
            ", ", floats(height), '], "area": ', floats(rounded(width * height, 3)),
            ', "iscrowd": ', np.asarray(box.field("ignore")).astype(np.int8),
            ', "origin": ', strings(box.field("origin")), self._score(),
        ]  # fmt: skip
        if outlined:
            right = floats(rounded(self._x1 + width, 3))
            bottom = floats(rounded(self._y1 + height, 3))
            parts += [
                ', "segmentation": [[', x, ", ", y, ", ", right, ", ", y, ", ", right, ", ",
                bottom, ", ", x, ", ", bottom, "]]",
            ]  # fmt: skip
        return _joined(*parts, "}")

    def _score(self) -> pa.Array:
        """[N]; nothing where a person drew the box."""
        score = self._box.field("score")
        known = floats(rounded(np.nan_to_num(np.asarray(score, np.float32)), 6))
        there = score.is_valid()
        return pc.if_else(there, pc.binary_join_element_wise(', "score": ', known, ""), "")


def _joined(*parts: str | pa.Array | NDArray[Any]) -> pa.Array:
    columns = [part if isinstance(part, str) else pc.cast(part, pa.string()) for part in parts]
    return pc.binary_join_element_wise(*columns, "")

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
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.exports.formats import ExportedImages, IgnoreBoxes, place_pictures, provenance
from pipelines.exports.place import ExportPlace
from storage.coco.json_text import (
    Texts,
    decimals,
    known_strings,
    lines,
    rounded,
    strings,
    text_of,
    whole_numbers,
)
from storage.labels.versions import LabelVersion

ANNOTATIONS = "annotations.json"

_COPIED = ("image_id", "sha256", "source", "annotator", "labelled_at", "width", "height")
_LISTS = ("images", "annotations", "ignore")
_DIVIDED = ",\n"
_IMAGES_AT_ONCE = 2_000  # a call for a few hundred costs as much
_BOXES_AT_ONCE = 1 << 13  # what they become stays in a cache
_Parts = list[bytes | Texts]  # of lines: the same for all, or one for each


class CocoExporter:
    """Writes images/ and annotations.json. The JSON is spooled: memory does not grow."""

    def __init__(
        self, place: ExportPlace, lineage: LabelVersion, ignore_boxes: IgnoreBoxes
    ) -> None:
        self._place, self._lineage, self._ignore_boxes = place, lineage, ignore_boxes
        self._official = [c.official_id for c in lineage.categories]
        self._rows: list[pa.Table] = []  # of images that wait for more
        self._names: list[str] = []
        self._count = dict.fromkeys(_LISTS, 0)

    def __enter__(self) -> CocoExporter:
        self._folder = tempfile.TemporaryDirectory(prefix="labelfleet-")
        self._lists = {name: self._path(name).open("wb") for name in _LISTS}
        self._lists["images"].write(self._head())
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
        self._rows.append(images.rows)
        self._names.extend(images.names)
        if len(self._names) >= _IMAGES_AT_ONCE:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Write the lines of the images that wait, and those of their boxes."""
        rows, names = pa.concat_tables(self._rows).combine_chunks(), self._names
        self._rows, self._names = [], []
        numbers = np.arange(1, len(names) + 1) + self._count["images"]
        self._write("images", text_of(_image_lines(rows, names, numbers)), len(names))
        labels = rows.column("labels").combine_chunks()
        box = labels.flatten()
        image = np.repeat(numbers, np.asarray(labels.value_lengths()))
        for first in range(0, len(box), _BOXES_AT_ONCE):
            some = slice(first, first + _BOXES_AT_ONCE)
            self._add_boxes(box[some], image[some])

    def _add_boxes(self, box: pa.StructArray, image: NDArray[np.int64]) -> None:
        """Some boxes, with the numbers of their images."""
        boxes = _Boxes(box, image, self._official)
        ignored = np.asarray(box.field("ignore"))
        kept = np.ones(len(ignored), np.bool_) if self._ignore_boxes == "in" else ~ignored
        for name, wanted in (("annotations", kept), ("ignore", ignored)):
            places = np.flatnonzero(wanted)
            ids = np.arange(1, len(places) + 1) + self._count[name]
            text = boxes.lines(ids, places, outlined=name == "annotations")
            self._write(name, text, len(places))

    def close(self) -> None:
        """Put the other lists behind that of the images, which is annotations.json from then on."""
        if self._names:
            self._add_waiting()
        whole = self._lists["images"]
        for name in _LISTS[1:]:
            self._lists[name].close()
            whole.write(f'\n],\n"{name}": [\n'.encode())
            with self._path(name).open("rb") as listed:
                shutil.copyfileobj(listed, whole)
            self._path(name).unlink()  # it may be gigabytes, on disk and in its cache
        whole.write(b"\n]}\n")
        whole.close()
        self._place.write(ANNOTATIONS, self._path("images"))

    def _head(self) -> bytes:
        """What stands before the images."""
        categories = [
            {"id": c.official_id, "name": c.name, "supercategory": ""}
            for c in self._lineage.categories
        ]
        info = json.dumps(provenance(self._lineage))
        return (
            f'{{"info": {info},\n"categories": {json.dumps(categories)},\n"images": [\n'
        ).encode()

    def _write(self, name: str, text: bytearray | memoryview, count: int) -> None:
        """Append ``count`` lines, each of which starts with the separator from the line before."""
        self._lists[name].write(text if self._count[name] else text[len(_DIVIDED) :])
        self._count[name] += count

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.json"


def _image_lines(rows: pa.Table, names: Sequence[str], numbers: NDArray[np.int64]) -> pa.Array:
    column = {name: rows.column(name).combine_chunks() for name in _COPIED}
    times = column["labelled_at"].dictionary_encode()
    written = [f'"{time.isoformat()}"' for time in times.dictionary.to_pylist()]
    return _joined(
        _DIVIDED + '{"id": ', numbers,
        ', "file_name": ', strings(pa.array(names, pa.string())),
        ', "width": ', column["width"], ', "height": ', column["height"],
        ', "labelfleet": {"image_id": ', strings(column["image_id"]),
        ', "sha256": ', strings(column["sha256"]),
        ', "source": ', known_strings(column["source"]),
        ', "annotator": ', known_strings(column["annotator"]),
        ', "labelled_at": ', pa.array(written, pa.string()).take(times.indices), "}}",
    )  # fmt: skip


class _Boxes:
    """N boxes of a version as annotations.

    Args:
        box: [N], in ``LABEL_TYPE``.
        image: [N], the numbers of their images.
        official: official category ids by category id.
    """

    def __init__(
        self, box: pa.StructArray, image: NDArray[np.int64], official: Sequence[int]
    ) -> None:
        self._count = len(box)
        corners = rounded(np.asarray(box.field("bbox").flatten()), 3).reshape(-1, 4)
        x1, y1, x2, y2 = (decimals(side, 3) for side in corners.T)
        width, height = (rounded(corners[:, n + 2] - corners[:, n], 3) for n in (0, 1))
        kinds = np.array([f', "category_id": {n}, "bbox": [' for n in official], np.bytes_)
        self._said: _Parts = [
            b', "image_id": ', *whole_numbers(image),
            kinds.take(np.asarray(box.field("category_id"))),
            *_listed(x1, y1, decimals(width, 3), decimals(height, 3)),
            b'], "area": ', *decimals(rounded(width * height, 3), 3),
            _treated(box), *_score(box.field("score")),
        ]  # fmt: skip
        # Clockwise from the top left.
        outline = _listed(x1, y1, x2, y1, x2, y2, x1, y2)
        self._outline: _Parts = [b', "segmentation": [[', *outline, b"]]}"]

    def lines(
        self, ids: NDArray[np.int64], places: NDArray[np.int64], *, outlined: bool
    ) -> bytearray:
        """Return the JSON of the boxes at ``places`` [M], with the box as a polygon or without.

        Args:
            ids: [M], the annotations' own numbers.
        """
        parts = [*self._said, *(self._outline if outlined else [b"}"])]
        if len(places) < self._count:
            parts = [part if isinstance(part, bytes) else part.take(places) for part in parts]
        return lines([(_DIVIDED + '{"id": ').encode(), *whole_numbers(ids), *parts])


def _listed(*numbers: list[Texts]) -> _Parts:
    parts: _Parts = []
    for number in numbers:
        parts += [b", ", *number] if parts else number
    return parts


def _treated(box: pa.StructArray) -> Texts:
    """[N]; whether it is to be ignored, and whose it is."""
    origin = box.field("origin").dictionary_encode()
    said = [
        f', "iscrowd": {ignore}, "origin": {json.dumps(name)}'
        for name in origin.dictionary.to_pylist()
        for ignore in (0, 1)
    ]
    at: NDArray[np.int64] = 2 * np.asarray(origin.indices) + np.asarray(box.field("ignore"))
    return np.array(said, np.bytes_).take(at)


def _score(score: pa.FloatArray) -> _Parts:
    """[N]; nothing where a person drew the box."""
    known = decimals(rounded(np.nan_to_num(np.asarray(score, np.float32)), 6), 6)
    if not score.null_count:
        return [b', "score": ', *known]
    drawn = np.asarray(score.is_null())
    parts = [np.full(len(score), b', "score": '), *known]
    for part in parts:
        part[drawn] = b""
    return list(parts)


def _joined(*parts: str | pa.Array | NDArray[Any]) -> pa.Array:
    columns = [part if isinstance(part, str) else pc.cast(part, pa.string()) for part in parts]
    return pc.binary_join_element_wise(*columns, "")

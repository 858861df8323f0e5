"""COCO JSON: official category ids, empty images kept, ignore boxes twice over.

Evaluators ignore crowds, so ignore boxes are annotations with ``iscrowd: 1`` (unless they are to be
left out); trainers drop crowds, after which the object would be background, so the same boxes are
also in a top-level list ``ignore`` that a trainer can mask out. Each annotation has its box as a
polygon: pycocotools and several viewers fail without a ``segmentation``, or with an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.exports.formats import ExportedImages, IgnoreBoxes, place_pictures, provenance
from pipelines.exports.place import ExportPlace
from storage.coco.box_lines import BOX, DIVIDED, Boxes, BoxLines
from storage.coco.json_text import known_strings, strings, text_of
from storage.labels.versions import LabelVersion
from storage.objects.os_errors import temporary_folder, translating_os_errors

ANNOTATIONS = "annotations.json"

_COPIED = ("image_id", "sha256", "source", "annotator", "labelled_at", "width", "height")
_IMAGES_AT_ONCE = 2_000  # a call for a few hundred costs as much
_BOXES_AT_ONCE = 1 << 14  # what they become stays in a cache
_BYTES_AT_ONCE = 1 << 16  # likewise


class CocoExporter:
    """Writes images/ and annotations.json. What the JSON says is spooled: memory does not grow.

    Boxes are spooled as numbers and become text where they are written, behind all images.
    """

    def __init__(
        self, place: ExportPlace, lineage: LabelVersion, ignore_boxes: IgnoreBoxes
    ) -> None:
        self._place, self._lineage, self._ignore_boxes = place, lineage, ignore_boxes
        self._text = BoxLines([c.official_id for c in lineage.categories])
        self._rows: list[pa.Table] = []  # of images that wait for more
        self._names: list[str] = []
        self._images = 0

    def __enter__(self) -> CocoExporter:
        self._folder = temporary_folder()
        with translating_os_errors(self._folder.name):
            self._image_text = self._path("images").open("wb")
            self._boxes = self._path("boxes").open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for spool in (self._image_text, self._boxes):
            with suppress(OSError):  # a full disk; the folder is deleted next
                spool.close()
        self._folder.cleanup()

    def add(self, images: ExportedImages) -> None:
        """Some images with their labels."""
        place_pictures(self._place, images)
        self._rows.append(images.rows)
        self._names.extend(images.names)
        if len(self._names) >= _IMAGES_AT_ONCE:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Spool the lines of the images that wait, and their boxes."""
        rows, names = pa.concat_tables(self._rows).combine_chunks(), self._names
        self._rows, self._names = [], []
        numbers = np.arange(1, len(names) + 1) + self._images
        text = text_of(_image_lines(rows, names, numbers))
        with translating_os_errors(self._folder.name):
            _write(self._image_text, text, first=not self._images)
        self._images += len(names)
        labels = rows.column("labels").combine_chunks()
        image = np.repeat(numbers, np.asarray(labels.value_lengths()))
        boxes = self._text.records(labels.flatten(), image).tobytes()
        with translating_os_errors(self._folder.name):
            self._boxes.write(boxes)

    def close(self) -> None:
        """Write annotations.json."""
        if self._names:
            self._add_waiting()
        with translating_os_errors(self._folder.name):
            self._image_text.close()
            self._boxes.close()
        self._place.write(ANNOTATIONS, self)

    def pour(self, sink: BinaryIO) -> None:
        """Write the JSON."""
        sink.write(self._head())
        for text in self._spooled("images", _BYTES_AT_ONCE):
            sink.write(text)
        sink.write(b'\n],\n"annotations": [\n')
        self._pour_boxes(sink, annotations=True)
        sink.write(b'\n],\n"ignore": [\n')
        self._pour_boxes(sink, annotations=False)
        sink.write(b"\n]}\n")

    def _pour_boxes(self, sink: BinaryIO, *, annotations: bool) -> None:
        """Write the lines of the annotations, or of the boxes in the list ``ignore``."""
        count = 0
        for raw in self._spooled("boxes", _BOXES_AT_ONCE * BOX.itemsize):
            boxes: Boxes = np.frombuffer(raw, BOX)
            if not annotations:
                boxes = boxes[boxes["ignore"]]
            elif self._ignore_boxes == "out":
                boxes = boxes[~boxes["ignore"]]
            if len(boxes):
                ids = np.arange(1, len(boxes) + 1) + count
                text = self._text.lines(boxes, ids, outlined=annotations)
                _write(sink, text, first=not count)
                count += len(boxes)

    def _head(self) -> bytes:
        """Return what stands before the images."""
        categories = [
            {"id": c.official_id, "name": c.name, "supercategory": ""}
            for c in self._lineage.categories
        ]
        info = json.dumps(provenance(self._lineage))
        return (
            f'{{"info": {info},\n"categories": {json.dumps(categories)},\n"images": [\n'
        ).encode()

    def _spooled(self, name: str, nbytes: int) -> Iterator[bytes]:
        """Yield what was spooled; an error of these files is no error of the destination's."""
        path = self._path(name)
        with translating_os_errors(str(path)):
            source = path.open("rb")
        with source:
            while True:
                with translating_os_errors(str(path)):
                    some = source.read(nbytes)
                if not some:
                    return
                yield some

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / name


def _write(sink: BinaryIO, text: bytearray | memoryview, *, first: bool) -> None:
    """Write lines, each of which starts with the separator from the line before."""
    sink.write(text[len(DIVIDED) :] if first else text)


def _image_lines(rows: pa.Table, names: Sequence[str], numbers: NDArray[np.int64]) -> pa.Array:
    column = {name: rows.column(name).combine_chunks() for name in _COPIED}
    times = column["labelled_at"].dictionary_encode()
    written = [f'"{time.isoformat()}"' for time in times.dictionary.to_pylist()]
    return _joined(
        DIVIDED + '{"id": ', numbers,
        ', "file_name": ', strings(pa.array(names, pa.string())),
        ', "width": ', column["width"], ', "height": ', column["height"],
        ', "labelfleet": {"image_id": ', strings(column["image_id"]),
        ', "sha256": ', strings(column["sha256"]),
        ', "source": ', known_strings(column["source"]),
        ', "annotator": ', known_strings(column["annotator"]),
        ', "labelled_at": ', pa.array(written, pa.string()).take(times.indices), "}}",
    )  # fmt: skip


def _joined(*parts: str | pa.Array | NDArray[Any]) -> pa.Array:
    columns = [part if isinstance(part, str) else pc.cast(part, pa.string()) for part in parts]
    return pc.binary_join_element_wise(*columns, "")

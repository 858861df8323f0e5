"""Pages and animation frames as images of their own.

A further frame is represented by the bytes of its whole file, followed by a trailer with the
frame's number. Each frame therefore has a sha256 of its own, and the frame of a row can be found
from the file's bytes and that sha256: no further column is needed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from storage.records import ImageRecord, ImageRef, ShardKind

P = TypeVar("P", bound=ImageRef)

FRAMES_KEY = "max_frames"  # in a run's settings; absent: one row a file
_TRAILER, _NUMBER_NBYTES = b"\0labelfleet frame\0", 4
_LOOSE = re.compile(r"#([2-9]|[1-9][0-9]+)$")
_IN_TAR = re.compile(r"#([2-9]|[1-9][0-9]+)(?=(#1)*$)")


@dataclass(frozen=True, slots=True)
class Frames:
    """How files of several frames are read.

    Attributes:
        count: frames of a file; 1 where they cannot be counted.
        most: frames of one file that are labelled.
    """

    count: Callable[[bytes], int]
    most: int

    def expanded(
        self, record: ImageRecord, numbered: Callable[[int], str]
    ) -> Iterator[ImageRecord]:
        """Yield a record for each frame, the first as it is.

        Frames beyond ``most`` are one record more, ``too_large``, which says how many they are.

        Args:
            numbered: gives the id of frame 2, 3, …; asked once each, in this order.
        """
        yield record
        if record.data is None:
            return
        total = self.count(record.data)
        for number in range(2, min(total, self.most) + 1):
            yield replace(record, image_id=numbered(number), data=frame_bytes(record.data, number))
        if total > self.most:
            error = f"{total} frames; this run takes up to {self.most} of a file"
            image_id = numbered(self.most + 1)
            yield ImageRecord(image_id, record.offset, record.nbytes, None, "too_large", error)


def frame_bytes(data: bytes, number: int) -> bytes:
    """Return what stands for a frame: the file's bytes, and behind them which frame it is.

    The first one is the file itself.
    """
    if number == 1:
        return data
    return b"".join((data, _trailer(number)))


def split_frame(data: bytes) -> tuple[bytes, int]:
    """Return the file's bytes, and the number of the frame that is meant."""
    nbytes = len(_TRAILER) + _NUMBER_NBYTES
    if data[-nbytes:-_NUMBER_NBYTES] != _TRAILER:
        return data, 1
    return data[:-nbytes], max(1, int.from_bytes(data[-_NUMBER_NBYTES:], "big"))


def _trailer(number: int) -> bytes:
    return _TRAILER + number.to_bytes(_NUMBER_NBYTES, "big")


def as_labelled(data: bytes, image_id: str, sha256: str) -> bytes:
    """Return what was labelled of a file: ``data`` itself, or a frame of it, by its digest.

    Bytes of which no frame has that digest come back as they are: the caller compares.
    """
    number = _number(image_id)
    if number is None or not sha256:
        return data
    whole = hashlib.sha256(data)
    if whole.hexdigest() == sha256:
        return data
    for frame in range(2, number + 1):  # of repeated names, some numbers are of other files
        digest = whole.copy()
        digest.update(_trailer(frame))
        if digest.hexdigest() == sha256:
            return frame_bytes(data, frame)
    return data


def _number(image_id: str) -> int | None:
    found = _IN_TAR.search(image_id)
    return None if found is None else int(found[1])


def file_id(image_id: str, kind: ShardKind = "images") -> str:
    """Return the id without the number of a frame; in a tar also of a repeated name."""
    return (_LOOSE if kind == "images" else _IN_TAR).sub("", image_id)


def is_numbered(image_id: str) -> bool:
    """Return whether the id is that of a further frame, or of a repeated name in a tar."""
    return _number(image_id) is not None


def frames_labelled(inference: Mapping[str, Any]) -> int:
    """Return how many frames of a file a run labels, by its settings; 0: the first, as one row."""
    return int(inference.get(FRAMES_KEY) or 0)


class Wanted:
    """Images looked for among the files of a compressed tar."""

    def __init__(self, places: Iterable[P]) -> None:
        self._left: dict[str, list[ImageRef]] = {}
        for place in places:
            self._left.setdefault(file_id(place.image_id, "tar"), []).append(place)

    def __bool__(self) -> bool:
        return bool(self._left)

    def of(self, record: ImageRecord) -> Iterator[tuple[ImageRef, bytes]]:
        """Yield the images that a file of the tar holds, with their bytes; each once."""
        if record.data is None:
            return
        name = file_id(record.image_id, "tar")
        family = self._left.get(name, [])
        for place in list(family):
            data = as_labelled(record.data, place.image_id, place.sha256)
            alone = len(family) == 1 and place.image_id == record.image_id
            if alone or hashlib.sha256(data).hexdigest() == place.sha256:
                family.remove(place)
                yield place, data
        if not family:
            self._left.pop(name, None)

    @property
    def left(self) -> list[ImageRef]:
        """Return those that were not found yet."""
        return [place for family in self._left.values() for place in family]

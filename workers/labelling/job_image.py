"""One image of a job on its way through a worker, seen by the network whole or in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storage.records import AnnotationRow, Detections, ImageRecord
from workers.detectors.seams import merged_windows
from workers.images.letterbox import LetterboxTransform
from workers.images.prepare import OpenedImage, open_image
from workers.images.preprocessing import Preprocessing, Window
from workers.labelling.job import ShardJob

_RECORD_NBYTES = 1024  # what an image without bytes counts as while it waits


@dataclass(slots=True, eq=False)
class JobImage:
    """One image, handed from stage to stage: fetched, decoded, placed, labelled, written.

    Attributes:
        job, index: whose image it is, and its place in the shard.
        image_id: of the record.
        record: as it was read; None once it is decoded, so that its bytes go.
        opened: what decoding made of it: its pixels, or the row that says why there are none.
        windows: its tiles; empty: the network sees it as a whole.
    """

    job: ShardJob
    index: int
    image_id: str
    record: ImageRecord | None
    opened: OpenedImage | AnnotationRow | None = None
    windows: Sequence[Window] = ()
    _found: dict[int, tuple[LetterboxTransform, Detections]] = field(default_factory=dict)

    @property
    def waiting_nbytes(self) -> int:
        """What it counts as while it waits to be decoded."""
        encoded = None if self.record is None else self.record.data
        return len(encoded or b"") + _RECORD_NBYTES

    def open(self, preprocessing: Preprocessing, max_pixels: int) -> OpenedImage | AnnotationRow:
        """Decode it, once, and drop the encoded bytes; see ``open_image``."""
        record, self.record = self.record, None
        if record is None:
            raise ValueError("it was decoded before")
        self.opened = open_image(record, self.job.shard.shard_id, preprocessing, max_pixels)
        return self.opened

    @property
    def failed(self) -> bool:
        """Whether it has its row already, without labels: its other parts are not wanted."""
        return isinstance(self.opened, AnnotationRow)

    def add(self, number: int, transform: LetterboxTransform, found: Detections) -> bool:
        """Take the detections of one part, in input pixels; return whether the image is whole now.

        Any thread may call it.
        """
        with self.job.lock:
            if self.failed:
                return False  # another part failed, and the image's row was handed on
            self._found[number] = (transform, found)
            return len(self._found) == max(1, len(self.windows))

    def fail(self, row: AnnotationRow) -> bool:
        """Take the row of an image of which a part failed; False: another part failed before.

        Any thread may call it.
        """
        with self.job.lock:
            first = not self.failed
            self.opened = row if first else self.opened
            return first

    def row(self) -> AnnotationRow:
        """Return the image's row, once it failed or every part has its detections."""
        opened = self.opened
        if isinstance(opened, AnnotationRow):
            return opened
        if opened is None:
            raise ValueError(f"{self.image_id} was not decoded")
        parts = [self._found[number] for number in range(len(self._found))]
        upright = [transform.invert(found) for transform, found in parts]
        if not self.windows:
            return opened.row(upright[0])
        height, width = opened.image.size
        return opened.row(merged_windows(upright, self.windows, width, height))


class Part(NamedTuple):
    """What fills a slot of a batch: an image, or one of its tiles.

    Attributes:
        number: of the tile, in the order of the image's windows; 0 for a whole image.
        transform: how it lies in the slot.
    """

    image: JobImage
    number: int
    transform: LetterboxTransform

"""An image that the network sees in parts: its detections gathered until the last part is in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.records import AnnotationRow, Detections
from workers.detectors.seams import merged_windows
from workers.images.prepare import Prepared
from workers.images.preprocessing import Window


@dataclass(slots=True, eq=False)
class TiledImage:
    """Filled by the NMS threads in any order.

    Attributes:
        windows: the parts.
        width, height: of the upright image in pixels.
    """

    windows: Sequence[Window]
    width: int
    height: int
    _found: dict[int, Detections] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, number: int, prepared: Prepared, found: Detections) -> bool:
        """Take one part's detections, in input pixels; return whether it was the last part."""
        upright = prepared.transform.invert(found)
        with self._lock:
            self._found[number] = upright
            return len(self._found) == len(self.windows)

    def row(self, prepared: Prepared) -> AnnotationRow:
        """Return the image's row; ``prepared`` is any of its parts."""
        found = [self._found[number] for number in range(len(self.windows))]
        whole = merged_windows(found, self.windows, self.width, self.height)
        return prepared.upright_row(whole, self.width, self.height)


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an image, as it goes through the network."""

    image: TiledImage
    number: int

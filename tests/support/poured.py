"""A body that is made while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO


@dataclass
class Poured:
    """Writes its pieces, and then fails with ``error`` where there is one.

    Attributes:
        times: how often it was written.
    """

    pieces: Sequence[bytes]
    error: Exception | None = None
    times: int = 0

    def pour(self, sink: BinaryIO) -> None:
        self.times += 1
        for piece in self.pieces:
            sink.write(piece)
        if self.error is not None:
            raise self.error

"""Boxes that yielded to a likelier box of the same object: ``labels/<version>/alternatives.jsonl``.

One JSON object a line::

    {"image_id": "a.tar/7.jpg", "sha256": "…",
     "box": {"bbox": [x1, y1, x2, y2], "category": "truck", "score": 0.71, "probability": 0.6},
     "label": {"bbox": […], "category": "bus", "score": 0.83, "probability": 0.8, "ignore": false},
     "iou": 0.93}

``label`` is the label that the version holds in place of both.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.policy.box_batch import BoxBatch
from pipelines.truth.matching import iou_matrix

ALTERNATIVES = "alternatives.jsonl"


class AlternativesWriter:
    """Collects lines in a local file: memory does not grow with the run. A context manager."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._folder = tempfile.TemporaryDirectory(prefix="labelfleet-")
        self._file = (Path(self._folder.name) / ALTERNATIVES).open("wb")

    def __enter__(self) -> AlternativesWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._folder.cleanup()

    def add(
        self,
        batch: BoxBatch,
        wanted: NDArray[np.bool_],
        image_ids: Sequence[str],
        sha256s: Sequence[str],
    ) -> None:
        """Write the alternatives among the ``wanted`` boxes [N] of a batch.

        Args:
            image_ids, sha256s: by image of the batch.
        """
        for at in np.flatnonzero(wanted & batch.alternative):
            label = int(batch.winner[at])
            image = int(batch.image[at])
            line = {
                "image_id": image_ids[image],
                "sha256": sha256s[image],
                "box": self._box(batch, int(at)),
                "label": {
                    **self._box(batch, label), "ignore": not bool(batch.accepted[label])
                },
                "iou": round(float(iou_matrix(batch.boxes[[at]], batch.boxes[[label]])[0, 0]), 4),
            }  # fmt: skip
            self._file.write(json.dumps(line).encode() + b"\n")

    def _box(self, batch: BoxBatch, at: int) -> dict[str, Any]:
        return {
            "bbox": [round(float(v), 3) for v in batch.boxes[at]],
            "category": self._names[batch.category_ids[at]],
            "score": round(float(batch.scores[at]), 6),
            "probability": round(float(batch.right[at]), 6),
        }

    def finish(self) -> Path:
        """Return the file with all lines; without a line where there are none."""
        self._file.close()
        return Path(self._file.name)

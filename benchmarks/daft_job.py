"""One labelling job in Daft, as its guide to batch inference writes it; run by Daft's own Python.

    <daft environment>/bin/python -m benchmarks.daft_job FOLDER OUTPUT --model free

from_glob_path → download → decode_image → a class UDF (letterbox, detector) → write_parquet. The
last line of stdout is JSON: seconds of wall and CPU from when the detector was loaded, and the
peak memory. ``benchmarks.vs_daft`` makes the environment and calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.detectors import FreeDetector
from storage.records import Detections
from workers.detectors.protocol import Detector
from workers.images.letterbox import letterbox

BATCH = 8


class Noting(FreeDetector):
    """Notes how many images it saw, also for those that come after a kill."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self._notes = notes.open("ab", buffering=0)

    def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        """See ``Detector.detect``."""
        self._notes.write(bytes([len(batch)]))
        return super().detect(batch)


def cpu_s() -> float:
    """CPU seconds of this process and of those that it waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def maker(name: str, checkpoint: str) -> Callable[[], Detector]:
    """Return what makes the detector."""
    if name == "free":
        return FreeDetector
    from benchmarks.models import detector

    return lambda: detector(name, Path(checkpoint), "cpu")


def predictor(make: Callable[[], Detector], ready: Path) -> Any:
    """Return an instance of the class UDF."""
    import daft

    text, numbers, whole = daft.DataType.string(), daft.DataType.float32(), daft.DataType.int64()
    fields = {
        "path": text,
        "boxes": daft.DataType.list(numbers),
        "scores": daft.DataType.list(numbers),
        "classes": daft.DataType.list(whole),
    }

    @daft.cls(max_concurrency=1)
    class Predictor:
        def __init__(self) -> None:
            cv2.setNumThreads(1)
            self._detector = make()
            ready.write_text(json.dumps([time.time(), cpu_s()]))

        # daft is in no environment that is checked
        @daft.method.batch(  # type: ignore[untyped-decorator]
            return_dtype=daft.DataType.struct(fields), batch_size=BATCH
        )
        def label(self, paths: daft.Series, images: daft.Series) -> list[dict[str, Any]]:
            """Letterbox a batch, run the network, and turn boxes back."""
            placed = [
                letterbox(np.ascontiguousarray(image), self._detector.preprocessing)
                for image in images.to_pylist()
            ]
            found = self._detector.detect(np.stack([pixels for pixels, _ in placed]))
            upright = [way.invert(one) for (_, way), one in zip(placed, found, strict=True)]
            return [
                {
                    "path": path,
                    "boxes": one.boxes.reshape(-1).tolist(),
                    "scores": one.scores.tolist(),
                    "classes": one.category_ids.tolist(),
                }
                for path, one in zip(paths.to_pylist(), upright, strict=True)
            ]

    return Predictor()


def main() -> None:
    """Run the job once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="free")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--notes", type=Path, help="count there what the free detector sees")
    given = parser.parse_args()
    import daft
    from daft import col
    from daft.functions import decode_image, download

    ready = given.output.with_suffix(".ready")
    make = maker(given.model, given.checkpoint)
    if given.notes:
        make = partial(Noting, given.notes)
    udf = predictor(make, ready)
    images = daft.from_glob_path(str(given.folder / "*.jpg"))
    images = images.with_column("image", decode_image(download(col("path")), mode="RGB"))
    labelled = images.select(udf.label(col("path"), col("image")).alias("found"))
    labelled.write_parquet(str(given.output))
    began_s, spent_s = json.loads(ready.read_text())
    said = {
        "wall_s": time.time() - began_s,
        "cpu_s": cpu_s() - spent_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "daft": daft.__version__,
    }
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()

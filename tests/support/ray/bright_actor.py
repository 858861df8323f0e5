"""A LabelActor around the tests' brightness detector: a process that starts in a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from storage.records import Detections
from tests.support.ray import brightness as brightness
from tests.support.ray.brightness import BrightnessDetector
from workers.actors.actor import LabelActor, WorkerFacts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from storage.records import ImageRecord, Shard
    from workers.labelling.labeller import ShardLabeller


def bright_actor(
    pause_s: float = 0.0, *, pause_while: Path | None = None, load_while: Path | None = None
) -> type[LabelActor]:
    """Return the class; ``pause_s`` an image (as long as the file ``pause_while`` exists, if one is
    named). It does not start while ``load_while`` exists. Its ``device`` names the GPUs that Ray
    gave it."""
    # Ray's processes do not see the tests' folder.
    ray.cloudpickle.register_pickle_by_value(brightness)

    class SlowDetector(BrightnessDetector):
        def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
            if pause_while is None or pause_while.exists():
                time.sleep(pause_s * len(batch))
            return super().detect(batch)

    class BrightActor(LabelActor):
        def open(self) -> ShardLabeller:
            from storage.runs.manifest import Manifest
            from storage.shards.reading import read_shard
            from storage.stores.open import open_store
            from workers.labelling.labeller import ShardLabeller

            spec = self._spec
            manifest = Manifest.open(spec.output_url, spec.storage)
            source = open_store(spec.source_url, spec.storage)

            def read(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
                limit = spec.options.max_image_bytes
                return read_shard(source, shard, max_image_bytes=limit, abort=abort)

            run = manifest.record.identity
            return ShardLabeller(SlowDetector(), read, manifest.commit, run, spec.options)

        def start(self) -> WorkerFacts:
            while load_while is not None and load_while.exists():
                time.sleep(0.05)
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            return replace(super().start(), device=gpus)

    return BrightActor

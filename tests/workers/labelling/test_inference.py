"""Whose fault a failed batch is: an image's, or the worker's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from storage.errors import OutputNotFinite, WorkerLost
from storage.records import Detections
from tests.support.ray.brightness import BrightnessDetector
from workers.labelling.batch_size import BatchSize
from workers.labelling.inference import Inference, Results

NAMES = ("a", "b", "c", "d")


def results_of(detector: BrightnessDetector, *means: int) -> Results:
    pixels = np.stack([np.full((64, 64, 3), mean, np.uint8) for mean in means])
    return Inference(detector, BatchSize(8)).launch(pixels, NAMES[: len(means)])().finish()


def test_images_without_a_finite_output_cost_one_blank_image_a_batch() -> None:
    detector = BrightnessDetector(nan_on=77)
    found = results_of(detector, 77, 77, 77, 77)
    assert [type(one) for one in found] == [OutputNotFinite] * 4
    assert detector.batches == [4, 1, 1, 1, 1, 1]
    detector = BrightnessDetector(nan_on=77)
    found = results_of(detector, 10, 77, 12)
    assert [type(one) for one in found] == [Detections, OutputNotFinite, Detections]
    assert detector.batches == [3, 1, 1, 1, 1]


class _Breaks(BrightnessDetector):
    """Gives no finite output for anything from its n-th call on."""

    def __init__(self, call: int) -> None:
        super().__init__(nan_on=77)
        self._left = call

    def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        self._left -= 1
        if self._left < 0:
            raise OutputNotFinite("not finite")
        return super().detect(batch)


@pytest.mark.parametrize("call", range(5))
def test_a_device_that_breaks_at_any_image_of_a_batch_is_the_workers_fault(call: int) -> None:
    with pytest.raises(WorkerLost, match="the detector is broken: OutputNotFinite"):
        results_of(_Breaks(call), 77, 10, 12)

"""The batch size that is found while running is the fastest that fits."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest

from workers.labelling.batch_size import BatchSize


def settled(first: int, most: int | None, cost: Callable[[int], float], batches: int = 100) -> int:
    size = BatchSize(first, most)
    for _ in range(batches):
        size.ran(size.now, size.now * cost(size.now))
    return size.now


def test_a_size_that_was_told_stays() -> None:
    assert settled(4, None, lambda n: 1 / n) == 4


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        (lambda n: 1 + 8 / n, 32),  # launches cost: as large as may be
        (lambda n: 1 + n / 8, 1),  # caches spill: as small as can be
        (lambda n: 1.0, 8),  # all the same: where it began
        (lambda n: 1.0 - 0.001 * n, 8),  # hardly better: not worth the memory
        (lambda n: 2.0 if n > 16 else 1 + 8 / n, 16),
    ],
)
def test_it_climbs_to_the_fastest(cost: Callable[[int], float], best: int) -> None:
    assert settled(8, 32, cost) == best


def test_a_first_batch_that_is_slow_does_not_count() -> None:
    size = BatchSize(8, 32)
    for seconds in [800.0, *[8.0] * 4, *[16.0 * 0.99] * 50]:
        size.ran(size.now, seconds)
    assert size.now == 8


def test_where_a_late_wait_takes_from_the_next_batch_the_median_counts() -> None:
    size = BatchSize(8, 32, cost=median)
    for seconds in [*[8.0] * 5, 15.9, 29.0, 2.0, 15.9, 15.9, *[8.0] * 50]:
        size.ran(size.now, seconds)
    assert size.now == 8


def test_partial_batches_say_nothing() -> None:
    size = BatchSize(8, 32)
    for _ in range(100):
        size.ran(5, 0.001)
    assert size.now == 8


def test_what_does_not_fit_is_not_tried_again() -> None:
    size = BatchSize(8, 64)
    for _ in range(200):
        if size.now > 16:
            size.too_large(size.now)
        else:
            size.ran(size.now, 1.0)  # ever cheaper an image
    assert size.now == 16
    size.too_large(16)
    assert size.now == 8


def test_a_single_image_that_works_the_second_time_is_not_too_many() -> None:
    size = BatchSize(8, 64)
    size.too_large(1)
    assert size.now == 8

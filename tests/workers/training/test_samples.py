"""Mixtures draw by share, each part without repetition, as a function of seed and number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.images.preprocessing import ValueRange
from workers.training.augment import TrainingSample
from workers.training.samples import Mixture, Samples, drawn


@dataclass(frozen=True, slots=True)
class Numbers:
    """A set of ``count`` images whose only pixel is ``first`` + index."""

    count: int
    first: int = 0
    classes: tuple[str, ...] = ("a",)
    official_ids: tuple[int, ...] = (1,)
    objects: int = 0

    @property
    def digest(self) -> str:
        return f"{self.count}-{self.first}"

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        pixels = np.full((1, 1, 3), self.first + index, np.uint8)
        none = np.zeros((0, 4), np.float32)
        return TrainingSample(pixels, none, np.zeros(0, np.int64), none)


@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.001, 5), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_shares_hold_in_each_thousand_and_no_image_repeats_within_a_pass(
    counts: list[int], shares: list[float], seed: int
) -> None:
    mixture = Mixture(tuple(Numbers(n) for n in counts), tuple(shares[: len(counts)]))
    firsts = np.cumsum([0, *counts])
    held = shares[: len(counts)]
    total = sum(held)
    seen: dict[int, list[int]] = {part: [] for part in range(len(counts))}
    for start in (0, 1000):
        drawn_ = [drawn(mixture, seed, start + n) for n in range(1000)]
        parts = np.searchsorted(firsts, drawn_, side="right") - 1
        for part, share in enumerate(held):
            count = int((parts == part).sum())
            assert count >= 1
            assert count == pytest.approx(1000 * share / total, abs=len(counts))
            seen[part] += [
                d - firsts[part] for d, p in zip(drawn_, parts, strict=True) if p == part
            ]
    for part, indices in seen.items():
        size = counts[part]
        for start in range(0, len(indices) - size + 1, size):
            assert sorted(indices[start : start + size]) == list(range(size))


def test_a_mixture_of_one_draws_as_the_set_alone() -> None:
    alone: Samples = Numbers(7)
    mixed = Mixture((alone,), (0.5,))
    assert [drawn(mixed, 3, n) for n in range(40)] == [drawn(alone, 3, n) for n in range(40)]


def test_the_draw_depends_on_seed_and_number_alone() -> None:
    mixture = Mixture((Numbers(20), Numbers(30, 100)), (1, 3))
    forward = [drawn(mixture, 1, n) for n in range(2500)]
    assert [drawn(mixture, 1, n) for n in reversed(range(2500))] == forward[::-1]
    assert [drawn(mixture, 2, n) for n in range(2500)] != forward
    pixels = [int(mixture.sample(index).pixels[0, 0, 0]) for index in range(50)]
    assert pixels == [*range(20), *range(100, 130)]
    assert Counter(index >= 20 for index in forward[:1000]) == {True: 750, False: 250}


def test_the_digest_tells_parts_and_shares_apart() -> None:
    a, b = Numbers(20), Numbers(30)
    digests = [
        Mixture(parts, shares).digest
        for parts, shares in (((a, b), (1, 1)), ((b, a), (1, 1)), ((a, b), (1, 2)), ((a,), (1,)))
    ]
    assert len(set(digests)) == 4
    assert Mixture((a, b), (1, 1)).digest == Mixture((a, b), (2, 2)).digest


def test_without_shares_a_pass_shows_every_image_of_every_part_once() -> None:
    mixture = Mixture((Numbers(3), Numbers(4)))
    for start in (0, 7):
        assert sorted(drawn(mixture, 5, start + n) for n in range(7)) == list(range(7))

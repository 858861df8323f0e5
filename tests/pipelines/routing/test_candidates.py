"""The pool holds the best, in bounded memory, without near duplicates."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from pipelines.routing.candidates import BestPool, Likeness, distances

ranks = st.lists(st.tuples(st.integers(0, 20).map(float), st.integers(0, 2**40)), unique=True)


@settings(deadline=None)
@given(ranks, st.integers(0, 6))
def test_without_likeness_it_is_the_top_of_a_sort(
    offered: list[tuple[float, int]], capacity: int
) -> None:
    pool: BestPool[tuple[float, int]] = BestPool(capacity, None)
    for rank in offered:
        pool.offer(rank, 7, rank)
    assert pool.best_first() == sorted(offered, reverse=True)[:capacity]


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 3))
def test_no_two_kept_are_alike_and_the_best_is_kept(
    data: st.DataObject, capacity: int, bits: int
) -> None:
    offered = data.draw(ranks.filter(bool))
    hashes = [data.draw(st.integers(0, 63)) for _ in offered]
    pool: BestPool[tuple[tuple[float, int], int]] = BestPool(capacity, bits)
    for rank, phash in zip(offered, hashes, strict=True):
        pool.offer(rank, phash, (rank, phash))
    kept = pool.best_first()
    assert 1 <= len(kept) <= capacity
    assert kept[0][0] == max(offered)
    for i, (_, a) in enumerate(kept):
        assert all((a ^ b).bit_count() > bits for _, b in kept[i + 1 :])


def test_a_better_near_duplicate_replaces_the_worse() -> None:
    pool: BestPool[str] = BestPool(4, 2)
    pool.offer((1.0, 0), 0b0000, "worse")
    pool.offer((2.0, 0), 0b0001, "better")
    pool.offer((1.5, 0), 0b0011, "between")
    pool.offer((0.5, 0), 0b111111, "another")
    assert pool.best_first() == ["better", "another"]
    assert pool.near_duplicates == 2


def test_images_without_a_hash_are_like_nothing() -> None:
    pool: BestPool[str] = BestPool(4, 64)
    pool.offer((1.0, 0), None, "a")
    pool.offer((1.0, 1), None, "b")
    pool.offer((1.0, 2), 0, "c")
    assert sorted(pool.best_first()) == ["a", "b", "c"]


def test_many_replacements_leave_memory_bounded() -> None:
    pool: BestPool[int] = BestPool(8, 0)
    for n in range(5000):
        pool.offer((float(n), n), n % 4, n)
    assert pool.best_first() == [4999, 4998, 4997, 4996]
    assert len(pool._heap) <= 4 * 8 + 1


def test_likeness_grows() -> None:
    taken = Likeness(1)
    for n in range(0, 2000, 4):
        taken.add(n << 8)
    assert taken.has_like((1996 << 8) | 1)
    assert not taken.has_like((1996 << 8) | 3)
    assert not taken.has_like(None)
    everything = Likeness(None)
    everything.add(5)
    assert not everything.has_like(5)


def test_distance_is_hammings() -> None:
    found = distances(np.array([0, 2**64 - 1, 0b1011], np.uint64), 0b1000)
    assert found.tolist() == [1, 63, 2]

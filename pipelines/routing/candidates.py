"""The best images seen so far, in bounded memory, near duplicates kept out."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Likeness:
    """Perceptual hashes that are taken already, and whether another one is like any of them.

    Args:
        bits: Hamming distance up to which two images count as near duplicates; None: never.
    """

    def __init__(self, bits: int | None) -> None:
        self._bits = bits
        self._hashes: NDArray[np.uint64] = np.zeros(64, np.uint64)
        self._n = 0

    def add(self, phash: int | None) -> None:
        """Take a hash; images without one match none."""
        if phash is None or self._bits is None:
            return
        if self._n == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[self._n] = phash
        self._n += 1

    def has_like(self, phash: int | None) -> bool:
        """Return whether a hash within ``bits`` was added."""
        if phash is None or self._bits is None:
            return False
        return bool((distances(self._hashes[: self._n], phash) <= self._bits).any())


class BestPool(Generic[T]):
    """At most ``capacity`` items with the highest rank, no two of them near duplicates.

    Of two near duplicates the higher rank stays. The hashes are compared only for items that
    would enter, which gets rare: for n offers in random order about capacity * ln(n / capacity).

    Args:
        capacity: items held.
        bits: as in ``Likeness``.
    """

    def __init__(self, capacity: int, bits: int | None) -> None:
        self._capacity, self._bits = capacity, bits
        self._heap: list[tuple[tuple[float, int], int]] = []  # (rank, slot), lowest first
        self._items: dict[int, tuple[tuple[float, int], T]] = {}
        self._hashes = np.zeros(capacity, np.uint64)
        self._used = np.zeros(capacity, np.bool_)  # slots whose hash counts
        self._free = list(range(capacity))
        self.near_duplicates = 0  # turned away, or put out by a better one

    def wants(self, rank: tuple[float, int]) -> bool:
        """Return whether an item of this rank could enter; cheap, so call it first."""
        if len(self._items) < self._capacity:
            return True
        return self._capacity > 0 and rank > self._lowest()[0]

    def offer(self, rank: tuple[float, int], phash: int | None, item: T) -> None:
        """Take the item if it is good enough; ``rank`` is (value, tie-breaker)."""
        if not self.wants(rank):
            return
        like = self._like(phash)
        if any(self._items[slot][0] >= rank for slot in like):
            self.near_duplicates += 1
            return
        self.near_duplicates += len(like)
        for slot in like:
            self._drop(slot)
        if len(self._items) == self._capacity:
            self._drop(self._lowest()[1])
        self._take(rank, phash, item)

    def best_first(self) -> list[T]:
        """Return the items, highest rank first."""
        ranked = sorted(self._items.values(), key=lambda entry: entry[0], reverse=True)
        return [item for _, item in ranked]

    def _like(self, phash: int | None) -> list[int]:
        if phash is None or self._bits is None:
            return []
        near = (distances(self._hashes, phash) <= self._bits) & self._used
        return [int(slot) for slot in np.flatnonzero(near)]

    def _take(self, rank: tuple[float, int], phash: int | None, item: T) -> None:
        slot = self._free.pop()
        self._items[slot] = (rank, item)
        self._hashes[slot] = 0 if phash is None else phash
        self._used[slot] = phash is not None
        heapq.heappush(self._heap, (rank, slot))
        if len(self._heap) > 4 * self._capacity:  # mostly what drops left behind
            self._heap = [(held, slot) for slot, (held, _) in self._items.items()]
            heapq.heapify(self._heap)

    def _drop(self, slot: int) -> None:
        del self._items[slot]
        self._free.append(slot)
        self._used[slot] = False

    def _lowest(self) -> tuple[tuple[float, int], int]:
        while True:
            rank, slot = self._heap[0]
            held = self._items.get(slot)
            if held is not None and held[0] == rank:
                return rank, slot
            heapq.heappop(self._heap)  # left behind by a drop


def distances(hashes: NDArray[np.uint64], phash: int) -> NDArray[np.uint8]:
    """Hamming distances, uint8 [N], of N hashes to one."""
    out: NDArray[np.uint8] = np.bitwise_count(hashes ^ np.uint64(phash))
    return out

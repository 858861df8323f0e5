"""The audit's draw: a simple random sample of every stratum, in one pass and bounded memory.

An image's place in the random order is ``random_key(seed, image_id)``, so a sample can be extended
later: the first n of that order are a simple random sample whatever n is, and so are the first k
that were answered.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


def random_key(seed: int, image_id: str) -> int:
    """64 bits of BLAKE2b over seed and id: the same on every machine, unrelated between seeds."""
    text = f"{seed}\0{image_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class StratumDraw(Generic[T]):
    """The first ``capacity`` images of one stratum's random order, and the count of all."""

    def __init__(self, capacity: int) -> None:
        self.images = 0
        self._capacity = capacity
        self._heap: list[tuple[int, str, T]] = []  # keys negated: the last in order comes first

    def count(self, key: int) -> bool:
        """Count an image; True if it is among the first so far, and is to be taken."""
        self.images += 1
        if len(self._heap) < self._capacity:
            return True
        return self._capacity > 0 and -key > self._heap[0][0]

    def take(self, key: int, image_id: str, item: T) -> None:
        """Hold an image that ``count`` asked for."""
        push = heapq.heappush if len(self._heap) < self._capacity else heapq.heapreplace
        push(self._heap, (-key, image_id, item))

    def first(self, n: int) -> list[T]:
        """Return the first ``n`` in the random order."""
        ordered = sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))
        return [item for _, _, item in ordered[:n]]


def allocate(n: int, new: int, old: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Share ``n`` audit images out: the new stratum first, what is left over to the old ones.

    Args:
        n: audit images to draw.
        new: images of the stratum that no routing has drawn from.
        old: images not drawn yet, by older stratum.

    Returns:
        How many for the new stratum; how many more for each old one, in proportion to what it
        has left.
    """
    for_new = min(n, new)
    left = min(n - for_new, sum(old.values()))
    total = sum(old.values())
    shares = {name: left * size // total if total else 0 for name, size in old.items()}
    rest = left - sum(shares.values())
    # Hand out the remainder of the integer division one by one, largest fraction first.
    lost = sorted(old, key=lambda name: (-(left * old[name] % total if total else 0), name))
    for name in lost:
        if rest and shares[name] < old[name]:
            shares[name] += 1
            rest -= 1
    return for_new, shares

"""What a training draws from: sets of images with their targets, alone or mixed by shares.

The image of global number g is a function of the seed and g alone, so that neither a stop nor the
number of workers changes what is learned.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workers.images.preprocessing import ValueRange
from workers.training.augment import TrainingSample

_BLOCK = 1000  # images over which the shares of a mixture hold exactly


class Samples(Protocol):
    """A training set: images by index, with the classes they are labelled with."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by contiguous index."""

    @property
    def official_ids(self) -> tuple[int, ...]:
        """Ids that the data gives the classes."""

    @property
    def objects(self) -> int:
        """Boxes to learn, over all images."""

    @property
    def digest(self) -> str:
        """16 hex digits of what decides the data."""

    def __len__(self) -> int: ...

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        """Return one image, decoded, upright. Raises SourceError: it cannot be read or decoded."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several sets of the same classes, drawn by shares; itself a set of all their images.

    Attributes:
        shares: of the images drawn, one a part, positive; their sum counts as the whole. They are
            held exactly in each 1,000 images, rounded to a thousandth, which is also the least.
            None: each pass shows every image of every part once.
    """

    parts: tuple[Samples, ...]
    shares: tuple[float, ...] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by contiguous index, the same in all parts."""
        return self.parts[0].classes

    @property
    def official_ids(self) -> tuple[int, ...]:
        """Ids that the first part gives the classes."""
        return self.parts[0].official_ids

    @property
    def objects(self) -> int:
        """Boxes to learn, over all images."""
        return sum(part.objects for part in self.parts)

    @property
    def digest(self) -> str:
        """16 hex digits of what decides the data."""
        lots = [] if self.shares is None else self._lots(self.shares)
        text = repr(([part.digest for part in self.parts], lots))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        """Return one image, decoded, upright. Raises SourceError: it cannot be read or decoded."""
        for part in self.parts:
            if index < len(part):
                return part.sample(index, value_range)
            index -= len(part)
        raise IndexError(index)

    def draw(self, seed: int, number: int) -> int:
        """Return the index of image ``number`` of a training with this seed."""
        if self.shares is None:
            return _place(seed, number, len(self), 0)
        block, place = divmod(number, _BLOCK)
        lots = self._lots(self.shares)
        order = np.repeat(np.arange(len(lots)), lots)[_permutation((seed, 2, block), _BLOCK)]
        part = int(order[place])
        nth = block * lots[part] + int((order[:place] == part).sum())
        first = sum(len(p) for p in self.parts[:part])
        return first + _place(seed, nth, len(self.parts[part]), part)

    @staticmethod
    def _lots(shares: tuple[float, ...]) -> list[int]:
        """Images of each part in a block of 1,000: by largest remainder, at least 1."""
        exact = np.array(shares) / sum(shares) * _BLOCK
        lots = np.maximum(np.floor(exact), 1).astype(int)
        for part in np.argsort(lots - exact, kind="stable")[: max(0, _BLOCK - int(lots.sum()))]:
            lots[part] += 1
        lots[int(lots.argmax())] -= int(lots.sum()) - _BLOCK
        return [int(n) for n in lots]


def drawn(samples: Samples, seed: int, number: int) -> int:
    """Return the index of image ``number`` of a training with this seed.

    Each pass over a set shows every image once, in an order of its own.
    """
    if isinstance(samples, Mixture):
        return samples.draw(seed, number)
    return _place(seed, number, len(samples), 0)


def _place(seed: int, number: int, count: int, part: int) -> int:
    epoch, place = divmod(number, count)
    # Part 0 draws as a set on its own does.
    key = (seed, 0, epoch) if part == 0 else (seed, 0, epoch, part)
    return int(_permutation(key, count)[place])


@lru_cache(maxsize=32)
def _permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    return np.random.default_rng(list(key)).permutation(count)

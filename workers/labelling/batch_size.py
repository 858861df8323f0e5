"""Batch size: fixed, or the fastest of doubled and halved sizes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

_TRIALS = 4  # whole batches of a size before it is judged; the one before them warms it up
_BETTER = 0.97  # seconds an image, relative: another size must earn its memory and its wait


class BatchSize:
    """Used by one thread, but for ``now``, which any may read.

    From ``first`` it doubles as long as that makes images at least 3 % cheaper; where it never
    does, it halves as long as that does; then it stays. Nothing is run for the sake of measuring.

    Args:
        first: images of the first batches.
        most: never more than this; None: ``first`` is the size, and nothing is tried.
        cost: of a size, from what its batches took. The least, since other work on the machine
            only ever adds time; but not where a wait that ends late takes from the next batch's.
    """

    def __init__(
        self,
        first: int,
        most: int | None = None,
        *,
        cost: Callable[[Sequence[float]], float] = min,
    ) -> None:
        self._cost = cost
        self._most = first if most is None else max(most, first)
        self._seconds: list[float] = []
        self._search: Generator[int, float, int] | None = None
        self.now = first
        if most is not None:
            self._search = self._climb(first)
            next(self._search)

    def ran(self, images: int, seconds: float) -> None:
        """Report that a batch of ``images`` took ``seconds``."""
        if self._search is None or images != self.now:
            return
        self._seconds.append(seconds / images)
        if len(self._seconds) <= _TRIALS:
            return
        cost, self._seconds = self._cost(self._seconds[1:]), []
        try:
            self.now = self._search.send(cost)
        except StopIteration as done:
            self.now, self._search = done.value, None

    def too_large(self, images: int) -> None:
        """Report a batch that failed although its images succeeded alone: stay below its size."""
        if images == 1:
            return  # the size that worked is not smaller
        self._most = images // 2
        if self.now > self._most:
            self.now, self._search = self._most, None

    def _climb(self, best: int) -> Generator[int, float, int]:
        """Yields sizes to try, is sent their seconds an image, returns the one to stay with."""
        cost = yield best
        begun = best
        for step in (2.0, 0.5):
            while 1 <= (size := int(best * step)) <= self._most:
                tried = yield size
                if tried > _BETTER * cost:
                    break
                best, cost = size, tried
            if best != begun:
                break
        return best

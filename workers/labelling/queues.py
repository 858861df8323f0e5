"""Bounded queues between the stages of a worker: encoded bytes and pixel slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class ByteBudget:
    """Limit on the bytes that wait between two stages; one larger item may pass alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._waiting = limit, 0, 0
        self._closed = False
        # Taken itself: a condition's methods are written in Python, and each image comes by here.
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)

    @property
    def fill(self) -> float:
        """The share in use, 0 to 1."""
        return min(1.0, self._used / self._limit)

    def reserve(self, nbytes: int) -> None:
        """Wait for room, and take it."""
        with self._lock:
            while self._used and self._used + nbytes > self._limit and not self._closed:
                self._waiting += 1
                self._freed.wait()
                self._waiting -= 1
            self._used += nbytes

    def release(self, nbytes: int) -> None:
        """Give room back."""
        with self._lock:
            self._used -= nbytes
            # Below half only: waking the reader for every image costs more than it brings.
            if self._waiting and self._used <= self._limit // 2:
                self._freed.notify_all()

    def close(self) -> None:
        """Let every waiter through: the pipeline is ending."""
        with self._lock:
            self._closed = True
            self._freed.notify_all()


@dataclass(slots=True)
class Batch(Generic[T]):
    """One batch in the making.

    Attributes:
        buffer: what it was given to write into, of at least its size.
        pixels: uint8 [size, H, W, 3]; a slot's pixels are its decoder's until it is filled.
        items: what is in each slot that was taken; None: nothing, it could not be filled.
        sealed: no more slots are given out.
    """

    buffer: NDArray[np.uint8]
    pixels: NDArray[np.uint8]
    items: list[T | None] = field(default_factory=list)
    filled: int = 0
    sealed: bool = False
    first_s: float = 0.0  # when its first slot was filled

    @property
    def complete(self) -> bool:
        """Whether every slot that was given out has been filled."""
        return self.filled == len(self.items)


@dataclass(slots=True, eq=False)
class Slot(Generic[T]):
    """One image's place in a batch."""

    batch: Batch[T]
    index: int

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], to be overwritten whole."""
        view: NDArray[np.uint8] = self.batch.pixels[self.index]
        return view


class BatchRing(Generic[T]):
    """Batches that decoders fill slot by slot and one thread takes whole, without any copy.

    Args:
        allocate: a uint8 array [n, H, W, 3] for ``n`` images.
        size: images of a batch, as of now; asked whenever one is begun.
        buffers: how many batches exist, those with the taker included.
        partial_s: a partial batch goes after this wait, or when nothing is expected any more.
    """

    def __init__(
        self,
        allocate: Callable[[int], NDArray[np.uint8]],
        size: Callable[[], int],
        *,
        buffers: int,
        partial_s: float,
    ) -> None:
        self._allocate, self._size, self._partial_s = allocate, size, partial_s
        self._free: list[NDArray[np.uint8] | None] = [None] * buffers  # None: not made yet
        self._buffers = buffers
        self._filling: deque[Batch[T]] = deque()  # oldest first; only the last may be unsealed
        self._expected = 0
        self._closed = False
        self._lock = lock = threading.Lock()
        self._freed, self._filled = threading.Condition(lock), threading.Condition(lock)

    def expect(self, images: int) -> None:
        """Add to the images on their way to a slot; at zero a partial batch goes."""
        with self._lock:
            self._expected += images
            if self._expected == 0:
                self._filled.notify()

    def take(self) -> Slot[T] | None:
        """Return a slot to write one image into; waits for one. None: the ring is closed."""
        with self._lock:
            while not self._closed:
                batch = self._open()
                if batch is not None:
                    batch.items.append(None)
                    batch.sealed = len(batch.items) == len(batch.pixels)
                    return Slot(batch, len(batch.items) - 1)
                self._freed.wait()
        return None

    def _open(self) -> Batch[T] | None:
        if self._filling and not self._filling[-1].sealed:
            return self._filling[-1]
        if not self._free:
            return None
        buffer, size = self._free.pop(), self._size()
        if buffer is None or len(buffer) < size:
            buffer = self._allocate(size)
        self._filling.append(Batch(buffer, buffer[:size]))
        return self._filling[-1]

    def fill(self, slot: Slot[T], item: T | None) -> None:
        """Mark a slot as filled with ``item``'s pixels; None: they could not be made."""
        with self._lock:
            batch = slot.batch
            batch.items[slot.index] = item
            batch.filled += 1
            self._expected -= 1
            if batch.filled == 1:
                batch.first_s = time.monotonic()
            # The taker wants to know of a whole batch, and when a partial one begins its wait.
            whole = batch.sealed and batch.complete
            if whole or batch.filled == 1 or self._expected == 0:
                self._filled.notify()

    def next(self, *, wait: bool = True) -> Batch[T] | None:
        """Return the oldest batch, whole or partial; waits for one. None: the ring is closed.

        ``pixels`` of a partial batch has unfilled slots behind ``items``.

        Args:
            wait: False: also return None when no batch is ready now.
        """
        asked_s = time.monotonic()
        with self._lock:
            while not self._closed:
                batch = self._filling[0] if self._filling else None
                wait_s = None if batch is None else self._wait_s(batch, asked_s)
                if batch is not None and wait_s == 0:
                    return self._filling.popleft()
                if not wait:
                    break
                self._filled.wait(wait_s)
        return None

    def _wait_s(self, batch: Batch[T], asked_s: float) -> float | None:
        """Return the seconds until a batch may go: 0 now, None until notified."""
        if not batch.sealed and batch.filled:
            due_s = max(asked_s, batch.first_s) + self._partial_s - time.monotonic()
            if due_s > 0 and self._expected > 0:
                return due_s
            batch.sealed = True
        return 0 if batch.sealed and batch.complete else None

    def free(self, batch: Batch[T]) -> None:
        """Return a finished batch: its pixels may be overwritten."""
        with self._lock:
            self._free.append(batch.buffer)
            self._freed.notify_all()

    @property
    def waiting(self) -> float:
        """Filled slots, as a share of those that may wait, 0 to 1."""
        with self._lock:
            filled = sum(batch.filled for batch in self._filling)
            return min(1.0, filled / ((self._buffers - 1) * self._size()))

    def close(self) -> None:
        """Release every waiter; nothing is given out after this."""
        with self._lock:
            self._closed = True
            self._freed.notify_all()
            self._filled.notify_all()

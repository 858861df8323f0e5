"""Between the stages: bounded bytes, batches filled slot by slot, none lost and none twice."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.labelling.queues import Batch, BatchRing, ByteBudget


class Sizes:
    """A batch size that changes when told to, and the arrays that were made for it."""

    def __init__(self, now: int) -> None:
        self.now = now
        self.made: list[int] = []

    def allocate(self, images: int) -> NDArray[np.uint8]:
        self.made.append(images)
        return np.zeros((images, 2, 2, 3), np.uint8)


def ring_of(size: int, *, buffers: int = 3, partial_s: float = 600.0) -> BatchRing[int]:
    sizes = Sizes(size)
    return BatchRing(sizes.allocate, lambda: sizes.now, buffers=buffers, partial_s=partial_s)


def put(ring: BatchRing[int], item: int | None) -> None:
    ring.expect(1)
    slot = ring.take()
    assert slot is not None
    slot.pixels[:] = item or 0
    ring.fill(slot, item)


def taken(ring: BatchRing[int]) -> Batch[int]:
    batch = ring.next()
    assert batch is not None
    return batch


@pytest.mark.parametrize("decoders", [1, 4])
def test_every_item_comes_out_once_with_its_own_pixels(decoders: int) -> None:
    ring, count = ring_of(4, partial_s=0.01), 150
    seen: list[int] = []
    ring.expect(1)  # more may come, until all are on their way
    with ThreadPoolExecutor(decoders) as pool:
        sent = [pool.submit(put, ring, i if i % 7 else None) for i in range(1, count)]
        threading.Thread(
            target=lambda: ([s.result() for s in sent], ring.expect(-1)), daemon=True
        ).start()
        places = 0
        while places < count - 1:
            batch = taken(ring)
            places += len(batch.items)
            assert len(batch.items) <= 4
            for pixels, item in zip(batch.pixels, batch.items, strict=False):
                if item is not None:
                    seen.append(item)
                    assert (pixels == item).all()
            ring.free(batch)
    assert sorted(seen) == [i for i in range(1, count) if i % 7]


def test_a_partial_batch_goes_when_nothing_more_is_expected() -> None:
    ring = ring_of(8)
    ring.expect(1)
    put(ring, 1)
    put(ring, 2)
    ring.expect(-1)
    assert taken(ring).items == [1, 2]


def test_a_partial_batch_goes_after_its_wait_though_more_are_expected() -> None:
    ring = ring_of(8, partial_s=0.05)
    ring.expect(5)
    put(ring, 1)
    began_s = time.monotonic()
    assert taken(ring).items == [1]
    assert time.monotonic() - began_s >= 0.05
    put(ring, 2)  # not into the batch that went
    assert taken(ring).items == [2]


def test_a_batch_waits_for_slots_that_were_given_out() -> None:
    ring = ring_of(4, partial_s=0.01)
    ring.expect(2)
    slow, quick = ring.take(), ring.take()
    assert slow is not None
    assert quick is not None
    ring.fill(quick, 2)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(taken, ring)
        time.sleep(0.05)
        assert not batch.done()
        ring.fill(slow, 1)
        assert batch.result(10).items == [1, 2]


def test_decoders_wait_for_a_free_batch() -> None:
    ring = ring_of(1, buffers=2)
    put(ring, 1)
    put(ring, 2)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(put, ring, 3)
        time.sleep(0.05)
        assert not third.done()
        assert ring.waiting == 1.0
        ring.free(taken(ring))
        third.result(10)


def test_a_size_that_grows_gets_larger_arrays_and_one_that_shrinks_uses_those_it_has() -> None:
    sizes = Sizes(2)
    ring: BatchRing[int] = BatchRing(sizes.allocate, lambda: sizes.now, buffers=1, partial_s=600)
    for now in (2, 4, 2, 1):
        sizes.now = now
        for i in range(now):
            put(ring, i)
        batch = taken(ring)
        assert len(batch.items) == len(batch.pixels) == now
        ring.free(batch)
    assert sizes.made == [2, 4]


def test_closing_lets_everybody_go() -> None:
    ring = ring_of(1, buffers=1)
    put(ring, 1)
    with ThreadPoolExecutor(2) as pool:
        decoder = pool.submit(ring.take)
        taken(ring)
        taker = pool.submit(ring.next)
        ring.close()
        assert decoder.result(10) is None
        assert taker.result(10) is None


def test_budget_lets_one_oversized_item_through_and_blocks_the_next() -> None:
    budget = ByteBudget(10)
    budget.reserve(50)
    waiting = threading.Thread(target=budget.reserve, args=(1,), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    budget.release(50)
    waiting.join(10)
    assert not waiting.is_alive()

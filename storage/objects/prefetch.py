"""Prefetch with a few threads, in order, within a bounded number of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from storage.waiting import result_of

T = TypeVar("T")
R = TypeVar("R")

READERS = 8
AHEAD_BYTES = 64 << 20


def in_order(
    items: Iterable[T],
    fetch: Callable[[T], R],
    nbytes: Callable[[T], int] = lambda _: 0,
    *,
    readers: int = READERS,
    ahead_bytes: int = AHEAD_BYTES,
) -> Generator[R, None, None]:
    """Yield ``fetch(item)`` for every item in order, fetching ``readers`` at a time.

    Object storage is slow per request but parallel. Items are taken lazily. The bytes fetched or
    in flight ahead of the last result stay below ``ahead_bytes``, as counted by ``nbytes`` (a
    larger item is fetched alone); without it, twice ``readers`` items are. An error of ``fetch`` is
    raised in the item's place. Closing the iterator cancels fetches that have not started, and
    waits for none: after a Ctrl-C a server that does not answer would hold up the end.
    """
    waiting: deque[tuple[int, Future[R]]] = deque()
    ahead = 0
    source = iter(items)
    following = next(source, None)
    pool = ThreadPoolExecutor(readers, thread_name_prefix="fetch")
    try:
        while following is not None or waiting:
            while following is not None:
                size = nbytes(following)
                if waiting and (len(waiting) >= 2 * readers or ahead + size > ahead_bytes):
                    break
                waiting.append((size, pool.submit(fetch, following)))
                ahead += size
                following = next(source, None)
            size, fetched = waiting.popleft()
            yield result_of(fetched)
            ahead -= size
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

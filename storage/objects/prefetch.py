"""Fetch ahead with a few threads, give back in order, hold a bounded number of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

READERS = 8
AHEAD_BYTES = 64 << 20


def in_order(
    items: Iterable[T],
    fetch: Callable[[T], R],
    nbytes: Callable[[T], int],
    *,
    readers: int = READERS,
    ahead_bytes: int = AHEAD_BYTES,
) -> Generator[R, None, None]:
    """``fetch`` of every item, in the items' order, ``readers`` at a time.

    Object storage answers slowly, but in parallel. Items are taken lazily. What is fetched or on
    its way beyond the result given last stays under ``ahead_bytes`` by ``nbytes``'s reckoning
    (one item that is larger than that comes alone). An error of ``fetch`` is raised in its place.
    Closing the iterator drops what has not begun.
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
            yield fetched.result()
            ahead -= size
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

"""Whole objects from web servers: one request each, in bounded time and bytes."""

from __future__ import annotations

import asyncio
import weakref
from typing import cast

import aiohttp
from fsspec.asyn import get_loop, sync
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from storage.errors import (
    AccessDenied,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
    TooLarge,
)
from storage.stores.web_guard import guarded_client
from storage.urls import shown_url

_WAIT = wait_random_exponential(multiplier=0.5, max=10)
_LATER = frozenset({408, 425, 429})  # the server asks to come back
_CHUNK = 1 << 16


class WebGet:
    """Fetches http:// and https:// URLs. Thread-safe; connections are kept and shared.

    Args:
        attempts: tries a URL.
        idle_s: seconds without a byte after which a try ends.
        total_s: seconds after which a try ends in any case.
    """

    def __init__(self, attempts: int, *, idle_s: float = 30.0, total_s: float = 300.0) -> None:
        self._timeout = aiohttp.ClientTimeout(
            total=total_s, sock_connect=min(10.0, idle_s), sock_read=idle_s
        )
        self._attempts = attempts
        self._loop = get_loop()
        self._session: aiohttp.ClientSession | None = None

    def get(self, url: str, limit: int) -> bytes:
        """Return the body.

        Raises:
            TooLarge: more than ``limit`` bytes; the rest is not read.
            StorageUnavailable: no answer, 5xx, 429 or a cut body, at every try.
            ObjectNotFound, AccessDenied, StorageError: what the server says.
        """
        retrying = Retrying(
            stop=stop_after_attempt(self._attempts),
            wait=_WAIT,
            retry=retry_if_exception_type(StorageUnavailable),
            reraise=True,
        )
        return cast(bytes, retrying(sync, self._loop, self._get, url, limit))

    async def _get(self, url: str, limit: int) -> bytes:
        where = shown_url(url)
        try:
            session = await self._opened()
            async with session.get(url) as reply:
                _check(reply.status, where)
                return await _body(reply, limit)
        except (aiohttp.InvalidURL, ValueError) as exc:
            raise StorageError(f"{where} is not a valid web address") from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise StorageUnavailable(
                f"{where} could not be fetched ({type(exc).__name__})",
                hint="check the network and the server, then run the same command again",
            ) from exc

    async def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            session = await guarded_client(timeout=self._timeout)
            self._session = session
            weakref.finalize(self, _close, self._loop, session)
        return self._session


def _check(status: int, where: str) -> None:
    if status == 200:
        return
    if status in (404, 410):
        raise ObjectNotFound(f"{where} does not exist")
    if status in (401, 403):
        raise AccessDenied(f"access to {where} was refused (HTTP {status})")
    if status in _LATER or status >= 500:
        raise StorageUnavailable(
            f"{where}: the server still answered {status} after several tries",
            hint="it is overloaded or down: run the same command again later",
        )
    raise StorageError(f"{where}: the server answered HTTP {status}")


async def _body(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    parts: list[bytes] = []
    nbytes = reply.content_length or 0
    if nbytes <= limit:
        nbytes = 0
        async for part in reply.content.iter_chunked(_CHUNK):
            parts.append(part)
            nbytes += len(part)
            if nbytes > limit:
                break
    if nbytes > limit:
        raise TooLarge(f"{nbytes} bytes or more; the limit is {limit}")
    return b"".join(parts)


def _close(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    if loop.is_running() and not session.closed:
        asyncio.run_coroutine_threadsafe(session.close(), loop)

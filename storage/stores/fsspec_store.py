"""FsspecStore: every scheme that no store of ours serves, through fsspec."""

from __future__ import annotations

import builtins
import contextlib
import difflib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.registry import known_implementations
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from storage.errors import (
    BucketNotFound,
    ConfigError,
    LabelfleetError,
    NotAtomic,
    ObjectChanged,
    ObjectNotFound,
    ShortRead,
    StorageError,
    StorageUnavailable,
)
from storage.objects.bodies import at_rest
from storage.objects.protocols import Body, StorageOptions
from storage.records import StoredObject
from storage.stores.fsspec_errors import etag_of, from_driver_error
from storage.urls import Location, check_key, shown_url

_T = TypeVar("_T")
_WAIT = wait_random_exponential(multiplier=0.2, max=10)
_CHUNK_BYTES = 1 << 20


# Ours already, or layers over another store rather than a store.
_NOT_OFFERED = frozenset(
    {"s3", "s3a", "file", "local", "memory", "asynclocal", "zip", "tar", "libarchive", "dir"}
    | {"reference", "generic", "data", "cached", "blockcache", "filecache", "simplecache"}
    | {"asyncwrapper", "async_wrapper"}
)


def open_fsspec(place: Location, options: StorageOptions) -> FsspecStore:
    """Return the store for a scheme that fsspec knows.

    Raises:
        ConfigError: the scheme is unknown or wraps another store, or its driver is missing.
    """
    offered = set(known_implementations) - _NOT_OFFERED
    if place.scheme not in offered or "::" in place.url:
        near = difflib.get_close_matches(place.scheme, ["s3", "file", "memory", *offered], n=1)
        raise ConfigError(
            f"no store is known under {place.scheme}://",
            hint=f"did you mean {near[0]}://?" if near else "use s3://, file:// or a plain path",
        )
    try:
        fsspec.get_filesystem_class(place.scheme)
    except ImportError as exc:
        package = known_implementations[place.scheme]["class"].split(".")[0]
        advice = known_implementations[place.scheme].get("err", f"install {package}")
        raise ConfigError(
            f"the driver for {place.scheme}:// is not installed",
            hint=f"pip install {package}  ({advice})",
        ) from exc
    return FsspecStore(place, options)


class FsspecStore:
    """Objects below a URL of any scheme that fsspec serves.

    Reading, listing, ``put`` and ``delete`` work as far as the driver does them. No driver is
    known to create atomically under a race of many writers, so ``create`` and ``replace``
    raise NotAtomic: such a store is a source, not a run's output.

    ``list`` holds one folder's entries at a time. Where a driver gives no etag, checksum or
    time, the size alone is the etag.

    Args:
        place: the root.
        options: only ``attempts`` matters here.
    """

    atomic_create = False

    def __init__(self, place: Location, options: StorageOptions) -> None:
        self._place = place
        self._options = options
        self._driver: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self._place, "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._place, self._options, self._driver = state["place"], state["options"], None

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    @property
    def url(self) -> str:
        return shown_url(self._place.url)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        try:
            pending = [iter(self._entries(""))]
        except ObjectNotFound as exc:
            raise BucketNotFound(f"{self.url} does not exist, or is not a folder") from exc
        while pending:
            key = next(pending[-1], None)
            if key is None:
                pending.pop()
            elif key.endswith("/") and (key.startswith(prefix) or prefix.startswith(key)):
                pending.append(iter(self._entries(key)))
            elif key.startswith(prefix):
                yield self.head(key)

    def head(self, key: str) -> StoredObject:
        found = self._info(key)
        if found.get("size") is None:
            raise StorageError(f"{self._where(key)}: the server does not say how large it is")
        return StoredObject(key, int(found["size"]), etag_of(found))

    def get(self, key: str, *, if_match: str | None = None) -> bytes:
        with self.stream(key, if_match=if_match) as source:
            return source.read()

    def get_range(
        self, key: str, offset: int, nbytes: int, *, if_match: str | None = None
    ) -> bytes:
        if offset < 0 or nbytes < 0:
            raise ValueError("offset and nbytes must not be negative")
        path = self._path(key)
        found = self._expect(key, if_match)
        if found.get("size") is not None and offset + nbytes > int(found["size"]):
            raise ShortRead(
                f"{self._where(key)} ends at byte {found['size']}; "
                f"{nbytes} bytes from {offset} were asked for"
            )
        if nbytes == 0:
            return b""
        part = self.call(key, lambda fs: fs.cat_file(path, start=offset, end=offset + nbytes))
        if len(part) != nbytes:
            raise ShortRead(f"{self._where(key)}: {len(part)} of {nbytes} bytes arrived")
        if if_match is not None:
            self._expect(key, if_match)
        return bytes(part)

    @contextmanager
    def stream(self, key: str, *, if_match: str | None = None) -> Iterator[BinaryIO]:
        found = self._expect(key, if_match)
        raw = _ResumingFile(self, key, found, lambda: self._expect(key, if_match))
        with io.BufferedReader(raw, _CHUNK_BYTES) as reader:
            yield cast(BinaryIO, reader)

    def create(self, key: str, body: Body) -> str:
        raise self._not_atomic(key)

    def put(self, key: str, body: Body) -> str:
        path = self._path(key)
        with at_rest(body) as resting:

            def write(fs: Any) -> None:
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                if isinstance(resting, Path):
                    fs.put_file(str(resting), path)
                else:
                    fs.pipe_file(path, resting)

            self.call(key, write)
        return self.head(key).etag

    def replace(self, key: str, body: Body, *, if_match: str) -> str:
        raise self._not_atomic(key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(ObjectNotFound):  # what the caller wanted
            self.call(key, lambda fs: fs.rm_file(path))

    def leftovers(self) -> Iterator[StoredObject]:
        return iter(())

    def presign(self, key: str, *, expires_s: int) -> str:
        path = self._path(key)
        return str(self.call(key, lambda fs: fs.sign(path, expires_s)))

    def open_driver_file(self, fs: Any, key: str) -> Any:
        """Return the driver's own file object for one object."""
        return fs.open(self._path(key), "rb")

    def call(self, key: str, action: Callable[[Any], _T]) -> _T:
        """Run ``action`` on the driver; its errors are translated, transient ones retried."""
        retrying = Retrying(
            stop=stop_after_attempt(self._options.attempts),
            wait=_WAIT,
            retry=retry_if_exception_type(StorageUnavailable),
            reraise=True,
        )
        result: _T = retrying(self._once, key, action)
        return result

    def _once(self, key: str, action: Callable[[Any], _T]) -> _T:
        try:
            if self._driver is None:
                kind = fsspec.get_filesystem_class(self._place.scheme)
                arguments = kind._get_kwargs_from_urls(self._place.url)
                if self._place.scheme in ("http", "https"):
                    from storage.stores.web_guard import guarded_client

                    arguments["get_client"] = guarded_client
                self._driver = kind(**arguments, skip_instance_cache=True)
            return action(self._driver)
        except LabelfleetError:
            raise
        # The border to drivers that each raise errors of their own kind.
        except Exception as exc:
            raise from_driver_error(exc, self._where(key)) from exc

    def _entries(self, folder_key: str) -> builtins.list[str]:
        """Return keys of one folder's entries, those of folders ending in '/', so that sorting them
        sorts everything below them too."""
        folder = self._path(folder_key).rstrip("/") + "/"

        def names(fs: Any) -> builtins.list[str]:
            fs.invalidate_cache()
            root = fs._strip_protocol(folder).rstrip("/") + "/"
            entries = fs.ls(folder, detail=True)
            mark = {True: "/", False: ""}
            return [
                e["name"].rstrip("/").removeprefix(root) + mark[e.get("type") == "directory"]
                for e in entries
            ]

        found = self.call(folder_key, names)
        # A driver may list the folder itself; an index page also links to elsewhere.
        keys = {
            folder_key + n for n in found if n.strip("/") and "/" not in n[:-1] and "?" not in n
        }
        return sorted(keys, key=lambda k: k.encode("utf-8", "surrogateescape"))

    def _info(self, key: str) -> dict[str, Any]:
        path = self._path(key)
        found = self.call(key, lambda fs: fs.info(path))
        if found.get("type") == "directory":
            raise ObjectNotFound(f"{self._where(key)} does not exist")
        return cast("dict[str, Any]", found)

    def _expect(self, key: str, if_match: str | None) -> dict[str, Any]:
        found = self._info(key)
        if if_match is not None and etag_of(found) != if_match:
            raise ObjectChanged(f"{self._where(key)} is not the version expected")
        return found

    def _path(self, key: str) -> str:
        if key and not key.endswith("/"):
            check_key(key.partition("?")[0])
        return f"{self._place.url}/{key}"

    def _where(self, key: str) -> str:
        return shown_url(f"{self._place.url}/{key}")

    def _not_atomic(self, key: str) -> NotAtomic:
        return NotAtomic(
            f"{self._where(key)}: {self._place.scheme}:// is not known to create atomically",
            hint="put the output into S3 (or a server that speaks it), gs://, az:// or a folder",
        )


class _ResumingFile(io.RawIOBase):
    """A driver's file, forward only: reopened where it broke, its length verified at the end."""

    def __init__(
        self, store: FsspecStore, key: str, found: dict[str, Any], recheck: Callable[[], object]
    ) -> None:
        self._store = store
        self._key = key
        self._size = None if found.get("size") is None else int(found["size"])
        self._recheck = recheck
        self._position = 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._store.call(self._key, lambda fs: self._read(fs, len(buffer)))
        buffer[: len(part)] = part
        self._position += len(part)
        if not part and self._size is not None and self._position != self._size:
            raise ShortRead(f"{self._key}: {self._position} of {self._size} bytes arrived")
        if not part:
            self._recheck()
        return len(part)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, fs: Any, nbytes: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._store.open_driver_file(fs, self._key)
                if self._position:
                    self._file.seek(self._position)
            return cast(bytes, self._file.read(nbytes))
        except BaseException:
            self._drop()  # the next try opens it anew
            raise

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # it is being given up
                file.close()

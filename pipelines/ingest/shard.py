"""One shard in the making: entries are fetched, appended to a spooled tar, and accounted for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.ingest.book import Failure, ShardRecord
from pipelines.ingest.entries import Entry, Unreachable, with_image_suffix
from storage.errors import ImageError
from storage.objects.os_errors import translating_os_errors
from storage.shards.tar_writer import TarWriter


@dataclass(frozen=True, slots=True)
class Fetched:
    """An entry that was read: its body and member name; or ``error``, why it could not be.

    ``unreachable``: the error is the server's, so that a later try may succeed.
    """

    entry: Entry
    body: bytes
    member: str
    error: str | None
    unreachable: bool = False


def fetch(entry: Entry) -> Fetched:
    """Read one entry. StorageError passes: then the source failed, not the entry."""
    try:
        body = entry.read()
        return Fetched(entry, body, with_image_suffix(entry.name, body), None)
    except ImageError as exc:
        return Fetched(entry, b"", "", exc.message, isinstance(exc, Unreachable))


class ShardInMaking:
    """A tar being written, in a spool file that is removed when the ``with`` block ends.

    Args:
        index: number of the shard.
        first: number of its first entry; every entry up to its last is added in order.
    """

    def __init__(self, index: int, first: int) -> None:
        self._index = index
        self._first = self._last = first
        self._failures: list[Failure] = []
        self._images = self._image_nbytes = 0

    def __enter__(self) -> ShardInMaking:
        with translating_os_errors("the spool file of a shard"):
            self._folder = tempfile.TemporaryDirectory(prefix="labelfleet-ingest-")
            self._path = Path(self._folder.name) / "shard.tar"
            self._tar = TarWriter(self._path.open("wb"))
        return self

    def __exit__(self, *exc: object) -> None:
        self._tar.discard()
        self._folder.cleanup()

    def has_room(self, fetched: Fetched, images_per_shard: int, shard_bytes: int) -> bool:
        """Return whether the tar stays within both limits with this entry too."""
        if fetched.error is not None or self._images == 0:
            return True
        fits = self._tar.nbytes_with(fetched.member, len(fetched.body)) <= shard_bytes
        return self._images < images_per_shard and fits

    def add(self, fetched: Fetched, number: int | None = None) -> None:
        """Append an image, or note a failure.

        Args:
            number: the entry's, where entries between this one and the last are left out.

        Raises StorageFull when the spool disk is full.
        """
        if number is not None:
            self._last = number
        if fetched.error is not None:
            failure = Failure(self._last, fetched.entry.name, fetched.entry.where, fetched.error)
            self._failures.append(failure)
        else:
            with translating_os_errors("the spool file of a shard"):
                self._tar.add(fetched.member, fetched.body)
            self._images += 1
            self._image_nbytes += len(fetched.body)
        self._last += 1

    def hopeless(self, failures: int) -> bool:
        """Return whether at least this many entries failed and none was read."""
        return self._images == 0 and len(self._failures) >= failures

    def close(self) -> Path:
        """Finish the tar; the path is valid until the ``with`` block ends."""
        with translating_os_errors("the spool file of a shard"):
            self._tar.close()
        return self._path

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The entries that could not be read so far."""
        return tuple(self._failures)

    def record(self, spool: Path) -> ShardRecord:
        """Return what went in, after ``close``."""
        return ShardRecord(
            self._index, self._first, self._last, self._images, self._image_nbytes,
            spool.stat().st_size if self._images else 0,
            self._tar.sha256() if self._images else "",
            tuple(self._failures),
        )  # fmt: skip

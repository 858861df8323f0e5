"""A training's output at a URL: a local folder whose files follow to the store in the background.

Whatever writes below the folder writes as to a local output: complete files that appear by renaming
(names ending in ``.partial`` are on their way). A change reaches the store in the order in which
the files changed, so that a state never arrives before the checkpoint that it counts as kept.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from storage.errors import LabelfleetError, ObjectNotFound
from storage.objects.protocols import (
    SupportsDelete,
    SupportsList,
    SupportsPut,
    SupportsStream,
)

log = logging.getLogger("labelfleet")

_EVERY_S = 2.0
_PARTIAL = (".partial", ".tmp")
_Mark = tuple[int, int, int]  # inode, size, ns of the last change


class OutputStore(SupportsDelete, SupportsList, SupportsPut, SupportsStream, Protocol):
    """What a mirrored output needs of a store."""


class Mirror:
    """Uploads what changes below a folder. One writer a store: others only ``fetch``.

    Args:
        folder: local.
        store: rooted where the output is.
    """

    def __init__(self, folder: Path, store: OutputStore) -> None:
        self._folder, self._store = folder, store
        self._sent: dict[str, _Mark] = {}
        self._once = threading.Lock()

    def fetch(self) -> None:
        """Bring what the store holds; what is there counts as sent."""
        for found in self._store.list():
            target = self._folder / found.key
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.partial")
            with suppress(ObjectNotFound):  # replaced or removed since it was listed
                with self._store.stream(found.key) as source, partial.open("wb") as file:
                    shutil.copyfileobj(source, file)
                partial.replace(target)
        self._sent = self._listed()

    def send(self) -> None:
        """Upload what has changed since, and remove what is gone.

        Raises:
            StorageError: the store refused; what was not sent is tried again the next time.
        """
        with self._once, tempfile.TemporaryDirectory(prefix=".sending-", dir=self._folder) as kept:
            changed = self._snapshot(Path(kept))
            for name, mark, copy in changed:
                self._store.put(name, copy)
                self._sent[name] = mark
            for name in self._sent.keys() - self._listed().keys():
                self._store.delete(name)
                del self._sent[name]

    def _snapshot(self, kept: Path) -> list[tuple[str, _Mark, Path]]:
        """Return changed files, oldest change first, as links that later writes leave alone."""
        while True:
            listed = self._listed()
            changed = [
                (name, mark) for name, mark in listed.items() if self._sent.get(name) != mark
            ]
            changed.sort(key=lambda one: one[1][2])
            links = []
            for number, (name, mark) in enumerate(changed):
                link = kept / str(number)
                link.unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    os.link(self._folder / name, link)
                    links.append((name, mark, link))
            if self._listed() == listed:  # else one of them may be newer than it is taken for
                return links

    def _listed(self) -> dict[str, _Mark]:
        found: dict[str, _Mark] = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if name.startswith(".sending-") or name.endswith(_PARTIAL):
                continue
            with suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    found[name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found


@contextmanager
def mirrored(store: OutputStore, *, writes: bool) -> Iterator[Path]:
    """Yield a temporary folder with what the store holds; what changes there is sent if ``writes``.

    At the end everything is sent, also after an error, so that the next start continues from it.

    Raises:
        StorageError: at the start or at the end, when the store refuses. In between a refusal is
            logged and tried again.
    """
    with tempfile.TemporaryDirectory(prefix="labelfleet-training-") as folder:
        mirror = Mirror(Path(folder), store)
        mirror.fetch()
        if not writes:
            yield Path(folder)
            return
        ended = threading.Event()
        sender = threading.Thread(target=_keep_sending, args=(mirror, ended), daemon=True)
        sender.start()
        try:
            yield Path(folder)
        finally:
            ended.set()
            sender.join()
            mirror.send()


def _keep_sending(mirror: Mirror, ended: threading.Event) -> None:
    while not ended.wait(_EVERY_S):
        try:
            mirror.send()
        except (LabelfleetError, OSError) as exc:
            log.warning("the output could not be written, and will be tried again: %s", exc)

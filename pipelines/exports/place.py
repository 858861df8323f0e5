"""The destination of an export: claimed first, continued after a stop, marked done last.

``unfinished-export.json`` is the first object and says what is being written; the same export
started again continues, and takes the images that lie there as they are. Everything else is written
anew, so the result is the same as in one go. At the end ``export.json`` takes its place.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.errors import AlreadyExists, BucketNotFound, ConfigError
from storage.objects.bodies import has_body
from storage.objects.os_errors import translating_os_errors
from storage.objects.protocols import Body, ObjectStore
from storage.runs.manifest import Manifest
from storage.stores.local_files import open_folder
from storage.urls import check_key, overlaps, parse_url

STARTED = "unfinished-export.json"
DONE = "export.json"


class ExportPlace:
    """The destination of one export.

    Attributes:
        continued: an earlier attempt at the same export began here.
    """

    def __init__(self, store: ObjectStore, request: dict[str, Any], there: Iterable[str]) -> None:
        self._store, self._request = store, request
        self._there = frozenset(there)
        self.continued = bool(self._there)

    @property
    def url(self) -> str:
        """Where it lies."""
        return self._store.url

    def has(self, key: str) -> bool:
        """Return whether an earlier attempt wrote this object.

        Objects appear whole or not at all.
        """
        return key in self._there

    def write(self, key: str, body: Body) -> None:
        """Write an object; one of an earlier attempt is replaced.

        Raises:
            AlreadyExists: an object came there meanwhile that is not the earlier attempt's.
        """
        if not self.has(key):
            _create(self._store, key, body)
        elif not isinstance(body, bytes) or self._store.get(key) != body:
            self._store.put(key, body)

    def link(self, key: str, file: Path) -> None:
        """Write a symbolic link to ``file`` at ``key`` of a local store. Raises as ``write``."""
        *folders, name = check_key(key).split("/")
        root = parse_url(self.url).path
        with (
            translating_os_errors(f"{root}/{key}"),
            open_folder(root, folders, create=True) as folder,
        ):
            if self.continued and _is_link(name, folder):
                os.unlink(name, dir_fd=folder)
            try:
                os.symlink(file, name, dir_fd=folder)
            except FileExistsError as exc:
                raise AlreadyExists(f"{root}/{key} exists already") from exc

    def clear(self, prefix: str) -> None:
        """Delete what an earlier attempt wrote below ``prefix``."""
        gone = {key for key in self._there if key.startswith(prefix)}
        for key in sorted(gone):
            self._store.delete(key)
        self._there -= gone

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the export as complete."""
        self.write(DONE, json.dumps({**self._request, "summary": summary}, indent=2).encode())
        self._store.delete(STARTED)


def open_place(store: ObjectStore, manifest: Manifest, request: dict[str, Any]) -> ExportPlace:
    """Claim an empty place, or continue what the same request began there.

    Args:
        store: the destination.
        manifest: the run.
        request: what is exported and how, plain values.

    Raises:
        ConfigError: the place overlaps the run or its source, or holds anything else.
    """
    for what, url in (("run", manifest.url), ("source", str(manifest.record.source["url"]))):
        if overlaps(store.url, url):
            raise ConfigError(
                f"the export's place {store.url} overlaps the {what} {url}",
                hint="choose another place",
            )
    there = _keys(store)
    if there:
        _refuse_other(store, there, request)
    else:
        _create(store, STARTED, json.dumps(request, indent=2).encode())
    return ExportPlace(store, request, there)


def _create(store: ObjectStore, key: str, body: Body) -> None:
    try:
        store.create(key, body)
    except AlreadyExists:
        # The reply to our own may have been lost, and the request sent again.
        if not has_body(store, key, body):
            raise


def _keys(store: ObjectStore) -> list[str]:
    try:
        return [listed.key for listed in store.list()]
    except BucketNotFound:
        return []  # a folder that does not exist yet is empty


def _refuse_other(store: ObjectStore, there: list[str], request: dict[str, Any]) -> None:
    marker = next((key for key in (STARTED, DONE) if key in there), None)
    if marker is None:
        raise ConfigError(
            f"{store.url} is not empty: it holds {there[0]}",
            hint="an export never mixes with other files; choose an empty place",
        )
    try:
        found = json.loads(store.get(marker))
        begun = {key: found.get(key) for key in request}
    except (ValueError, AttributeError) as exc:
        raise ConfigError(f"{store.url}/{marker} cannot be read: {exc}") from exc
    if marker == DONE:
        raise ConfigError(
            f"{store.url} holds a complete export of {begun['version']} already",
            hint="choose an empty place",
        )
    if begun != request:
        differing = ", ".join(key for key in request if begun[key] != request[key])
        raise ConfigError(
            f"{store.url} holds an unfinished export that differs in {differing}",
            hint=f"continue it with `{_command(store.url, begun)}`, or delete it",
        )


def _command(place: str, begun: dict[str, Any]) -> str:
    """Return the command that continues an export, as text to be read and pasted."""
    options = {"--format": "format", "--version": "version", "--images": "images",
               "--ignore-boxes": "ignore_boxes"}  # fmt: skip
    known = {name: begun[key] for name, key in options.items() if begun.get(key) is not None}
    told = [str(word) for option in known.items() for word in option]
    return shlex.join(["labelfleet", "export", str(begun.get("run")), place, *told])


def _is_link(name: str, folder: int) -> bool:
    try:
        os.readlink(name, dir_fd=folder)
    except OSError:
        return False
    return True

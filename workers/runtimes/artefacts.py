"""Runtime artefacts: a network made ready for a runtime, its files and the JSON that names them.

An artefact is a folder at any URL: ``artefact.json`` and the files whose digests it states. The
JSON is put last and only once, so what can be found is whole; a worker knows the JSON by its own
digest, and so every byte. Files are ONNX or OpenVINO IR: data, never code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import AlreadyExists, ArtefactError, CheckpointError, ObjectNotFound
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.stores.open import open_object
from workers.checkpoints.cache import fetch_file, file_sha256
from workers.spec import ArtefactRef

SIDECAR = "artefact.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Artefact:
    """An artefact on this machine's disk.

    Attributes:
        files: local paths by name.
        main: name of the file to load.
        facts: all of ``artefact.json``.
    """

    files: Mapping[str, Path]
    main: str
    facts: Mapping[str, Any]


def publish(
    store: ObjectStore, folder: str, files: Mapping[str, Path], main: str, facts: Mapping[str, Any]
) -> ArtefactRef:
    """Put an artefact below ``folder`` of a store, or find that it is there already.

    Two makers at once: the first one's JSON stays, and both get its reference.

    Raises:
        StorageError: the store refused.
    """
    digests = {name: file_sha256(path) for name, path in files.items()}
    for name, path in files.items():
        _put_once(store, f"{folder}/{_stored_name(name, digests[name])}", path)
    listed = {
        name: {
            "object": _stored_name(name, digests[name]),
            "sha256": digests[name],
            "nbytes": path.stat().st_size,
        }
        for name, path in files.items()
    }
    fields = {"format": FORMAT, "main": main, "files": listed, **facts}
    text = json.dumps(fields, indent=2, sort_keys=True).encode()
    try:
        store.create(f"{folder}/{SIDECAR}", text)
    except AlreadyExists:
        text = store.get(f"{folder}/{SIDECAR}")
    return _reference(store, folder, text)


def find(store: ObjectStore, folder: str) -> ArtefactRef | None:
    """Return the artefact below ``folder``, or None."""
    try:
        return _reference(store, folder, store.get(f"{folder}/{SIDECAR}"))
    except ObjectNotFound:
        return None


def fetch_artefact(ref: ArtefactRef, options: StorageOptions) -> Artefact:
    """Bring an artefact to this machine, and check every byte of it.

    Raises:
        ArtefactError: gone, damaged, or another one than the run was created with.
        StorageError: the store refused or failed.
    """
    store, key = open_object(ref.url, options)
    try:
        text = store.get(key)
    except ObjectNotFound as exc:
        raise ArtefactError(
            f"the run's model artefact {ref.url} is gone",
            hint="put it back, or start a new run at another output",
        ) from exc
    if hashlib.sha256(text).hexdigest() != ref.sha256:
        raise ArtefactError(
            f"{ref.url} is not the model artefact that the run was created with",
            hint="put the right one back, or start a new run at another output",
        )
    facts = read_facts(text, ref.url)
    folder = ref.url.rpartition("/")[0]
    try:
        files = {
            name: fetch_file(f"{folder}/{part['object']}", options, sha256=part["sha256"])
            for name, part in facts["files"].items()
        }
    except CheckpointError as exc:
        raise ArtefactError(
            f"the run's model artefact is not whole: {exc.message}",
            hint="put its files back, or start a new run at another output",
        ) from exc
    return Artefact(files, facts["main"], facts)


def read_facts(text: bytes, url: str) -> dict[str, Any]:
    """``artefact.json``. Raises ArtefactError when it is not one of ours."""
    try:
        facts = json.loads(text)
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r:.20}")
        for name, part in facts["files"].items():
            if "/" in part["object"] or not re.fullmatch(r"[0-9a-f]{64}", part["sha256"]):
                raise ValueError(f"file {name!r:.40}")
        if facts["main"] not in facts["files"]:
            raise ValueError("no main file")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ArtefactError(f"{url} is not a model artefact: {exc!r:.200}") from exc
    return dict(facts)


def _stored_name(name: str, sha256: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-{sha256[:16]}.{suffix}"


def _put_once(store: ObjectStore, key: str, path: Path) -> None:
    with suppress(AlreadyExists):  # its name is its digest: the same bytes
        store.create(key, path)


def _reference(store: ObjectStore, folder: str, text: bytes) -> ArtefactRef:
    url = f"{store.url.rstrip('/')}/{folder}/{SIDECAR}"
    return ArtefactRef(url, hashlib.sha256(text).hexdigest())

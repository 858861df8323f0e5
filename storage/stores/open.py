"""The store that a URL means."""

from __future__ import annotations

from storage.extras import not_installed
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.urls import Location, parse_url, split_url


def open_store(url: str, options: StorageOptions | None = None) -> ObjectStore:
    """Return the store for a URL: s3:// by boto3 (small reads by obstore), gs:// and az:// by
    obstore, file:// and plain paths by our own code, memory:// inside one process; every other
    scheme, read only by a run, through fsspec.

    Opening touches nothing: a missing bucket or folder shows at the first verb; ``put`` and
    ``create`` on file:// make the folders they need.

    Raises:
        ConfigError: the URL cannot be read, or its scheme is not known here.
        NotInstalled: gs:// or az:// without the extra ``clouds``.
    """
    place = parse_url(url)
    options = options or StorageOptions()
    # Imported here, so that reading a local folder loads neither boto3 nor fsspec.
    if place.scheme == "file":
        from storage.stores.local import LocalStore

        return LocalStore(place.path)
    if place.scheme == "s3":
        from storage.s3.store import S3Store

        return S3Store(place.authority, place.path, options)
    if place.scheme in ("gs", "az"):
        return _cloud(place, options)
    if place.scheme == "memory":
        from storage.stores.memory import MemoryStore

        return MemoryStore(place.authority, place.path)
    from storage.stores.fsspec_store import open_fsspec

    return open_fsspec(place, options)


def _cloud(place: Location, options: StorageOptions) -> ObjectStore:
    try:
        from storage.clouds.store import CloudStore
    except ModuleNotFoundError as exc:
        lacking = not_installed(exc)
        if lacking is None:
            raise
        raise lacking from exc
    return CloudStore(place, options)


def open_object(url: str, options: StorageOptions | None = None) -> tuple[ObjectStore, str]:
    """Return the store that holds a single object (a checkpoint, a list of keys), and its key
    there.

    Raises:
        ConfigError: as ``open_store``; or the URL names a bucket or a folder.
    """
    root, key = split_url(url)
    return open_store(root, options), key

"""Check that the single files a run's config names are there, before anything is spent."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipelines.config.run_config import RunConfig
from storage.errors import BucketNotFound, ConfigError, ObjectNotFound
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_object
from storage.urls import parse_url, shown_url

FILL_IN = "FILL-IN"  # names of files that `labelfleet init` could not know begin with it

_TO_FILL_IN = {
    "model.checkpoint": "name your weights, a path or URL",
    "model.arch": "name the arch_params yaml that the weights were trained with; super-gradients' "
    "recipes/arch_params/yolo_nas_s_arch_params.yaml is the one to scale",
}


def check_files(config: RunConfig) -> None:
    """Raise ConfigError naming every field whose file does not exist, or was never filled in.

    The model's checkpoint and the source are not among them: like a store that does not answer,
    they may come back, and reading them says so.
    """
    named = _named(config)
    left = {"model.checkpoint": config.model.checkpoint, **named}
    if unfilled := [field for field, url in left.items() if _is_unfilled(url)]:
        shown = ", ".join(f"{field}, now {left[field]}" for field in unfilled)
        raise ConfigError(
            f"still to be filled in: {shown}",
            hint="; ".join(_TO_FILL_IN[field] for field in unfilled if field in _TO_FILL_IN)
            or None,
        )
    absent = list(absent_files(named, config.storage.options()))
    if absent:
        raise ConfigError(
            "; ".join(absent),
            hint="a path is relative to the folder the command is started in",
        )


def _is_unfilled(url: str) -> bool:
    return url.rpartition("/")[2].startswith(FILL_IN)


def absent_files(named: Mapping[str, str], options: StorageOptions) -> Iterator[str]:
    """Yield a line for each field whose URL names nothing.

    Web addresses are not asked: a server may refuse what is not a plain download.
    """
    for field, url in named.items():
        if parse_url(url).scheme in ("http", "https"):
            continue
        store, key = open_object(url, options)
        try:
            store.head(key)
        except (ObjectNotFound, BucketNotFound):
            yield f"{field}: there is nothing at {shown_url(url)}"


def _named(config: RunConfig) -> dict[str, str]:
    """Return the URL of every single file by the field that names it."""
    review, gate = config.review, config.gate
    fields: Iterable[tuple[str, str | None]] = (
        ("model.arch", config.model.arch),
        ("source.keys", config.source.keys),
        ("policy", config.policy if isinstance(config.policy, str) else None),
        ("review.gold_truth", review.gold_truth if review else None),
        ("gate.truth", gate.truth if gate else None),
    )
    return {field: url for field, url in fields if url is not None}


def refuse_below_a_file(field: str, url: str) -> None:
    """Raise ConfigError where a local folder cannot be made, since a file stands in its place."""
    place = parse_url(url)
    if place.scheme != "file":
        return
    path = Path(place.path)
    for one in (path, *path.parents):
        if os.path.isfile(one):  # noqa: PTH113 - false, not an error, where it may not be looked at
            raise ConfigError(
                f"{field}: {url} needs a folder where {one} is a file",
                hint="choose a place that is not below a file",
            )

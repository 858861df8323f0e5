"""Check that the single files a run's config names are there, before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pipelines.config.run_config import RunConfig
from storage.errors import BucketNotFound, ConfigError, ObjectNotFound
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_object
from storage.urls import parse_url, shown_url


def check_files(config: RunConfig) -> None:
    """Raise ConfigError naming every field whose file does not exist.

    The model's checkpoint and the source are not among them: like a store that does not answer,
    they may come back, and reading them says so.
    """
    absent = list(absent_files(_named(config), config.storage.options()))
    if absent:
        raise ConfigError(
            "; ".join(absent),
            hint="a path is relative to the folder the command is started in",
        )


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

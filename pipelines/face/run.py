"""A run to read: its rows, its label versions and the bytes of its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pipelines.runs.status import RunStatus, run_status
from storage.errors import LabelfleetError
from storage.labels.rows import LabelRow, label_rows
from storage.labels.versions import read_label_tables, read_version, versions
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow, ImageRef
from storage.runs.image_bytes import read_images
from storage.runs.live_rows import live_rows, live_tables
from storage.runs.manifest import Manifest
from storage.stores.open import open_store

P = TypeVar("P", bound=ImageRef)


class Run:
    """A run at its output URL. Everything streams: nothing is read before it is asked for.

    Args:
        url: the run's output, a URL or path.
        endpoint_url: S3-compatible server; None: AWS_ENDPOINT_URL or AWS.

    Raises:
        ConfigError: the URL holds no run.
    """

    def __init__(self, url: str | Path, *, endpoint_url: str | None = None) -> None:
        self.options = StorageOptions(endpoint_url=endpoint_url)
        self.manifest = Manifest.open(str(url), self.options)

    @property
    def url(self) -> str:
        """The run's output."""
        return self.manifest.url

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; ``category_id`` is the position."""
        return tuple(c.name for c in self.manifest.record.identity.categories)

    def status(self) -> RunStatus:
        """Return counts, and how the last invocation went."""
        return run_status(self.manifest)

    def rows(self) -> Iterator[AnnotationRow]:
        """Yield the model's row for each image, in listing order."""
        return live_rows(self.manifest)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the same as Arrow tables, a row group at a time.

        Args:
            columns: names from the annotation schema (docs/annotations.md); None: all.
        """
        return (table for _, table in live_tables(self.manifest, columns))

    def label_versions(self) -> list[str]:
        """Return the names of the label versions, oldest first."""
        return versions(self.manifest.store)

    def labels(self, version: str | None = None) -> Iterator[LabelRow]:
        """Return the labels of each image, one after the other.

        Args:
            version: a name; None: the latest.

        Raises:
            ConfigError: the version does not exist; the message lists those that do.
        """
        lineage = read_version(self.manifest.store, version)  # at once, not at the first row
        tables = read_label_tables(self.manifest.store, lineage)
        return (row for table in tables for row in label_rows(table))

    def images(self, rows: Sequence[P]) -> Iterator[tuple[P, bytes | LabelfleetError]]:
        """Yield each row with its image file's bytes, or with the reason why it has none.

        Of a further frame, the text that names it stands behind the bytes of its file: ``frames``
        in docs/images.md.

        Args:
            rows: annotation or label rows, read from the source in an order of its own.
        """
        source = open_store(self.manifest.record.source["url"], self.options)
        return read_images(self.manifest, source, rows)


def opened(run: Run | str | Path) -> Run:
    """Return a run as it is, or the run at a URL or path.

    Raises:
        ConfigError: the URL holds no run.
    """
    return run if isinstance(run, Run) else Run(run)

"""Bodies for the stores that must know a body's length before they send it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.objects.os_errors import translating_os_errors
from storage.objects.protocols import AtRest, Body


@contextmanager
def at_rest(body: Body) -> Iterator[AtRest]:
    """Give a body as bytes or a file; one that pours goes to a temporary file.

    Raises:
        StorageFull: the temporary folder has no space for it.
    """
    if isinstance(body, bytes | Path):
        yield body
        return
    with tempfile.TemporaryDirectory(prefix="labelfleet-") as folder:
        spool = Path(folder) / "body"
        with translating_os_errors(str(spool)), spool.open("wb") as sink:
            body.pour(sink)
        yield spool

"""Keeps what Pillow and libtiff remark on damaged files out of the workers' logs.

The remark that matters is in the row's ``error``; these would reach the terminal of whoever
watches the run, without the name of the image.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import warnings
from pathlib import Path

import PIL


@functools.cache
def silence() -> None:
    """Once per process: no warnings, no log and no libtiff error handler any more."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # Pillow leaves libtiff's default handler, which prints to stderr, in place. Its wheels bring
    # the library beside the package; where it lies elsewhere, the lines are printed after all.
    for library in (Path(PIL.__file__).parent.parent / "pillow.libs").glob("libtiff*.so*"):
        ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)

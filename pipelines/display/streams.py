"""stdout and stderr at the border of the process: closed, a broken pipe, a file on a full disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from storage.errors import LabelfleetError


def open_closed_streams() -> None:
    """Point standard streams that were closed (``>&-``) at /dev/null.

    Otherwise the next file to be opened would get their descriptor, here or in a child process.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


@contextmanager
def printing() -> Iterator[None]:
    """Translate what goes wrong with stdout inside, but a pipe whose reader ended, as `head` does.

    Raises:
        LabelfleetError: stdout cannot be written, such as a file on a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the process ends with 1, and says nothing
    except OSError as exc:
        raise unprinted(exc) from exc


def unprinted(exc: OSError) -> LabelfleetError:
    """Return the error for a stdout that cannot be written."""
    return LabelfleetError(
        f"the result cannot be written to stdout: {exc.strerror}",
        hint="what the command did stays as it is",
    )


def flushed(stream: TextIO) -> OSError | None:
    """Flush a stream; return the error if that fails, and discard what was buffered.

    Python would flush again at exit, print a traceback and exit with 120.
    """
    try:
        stream.flush()
    except OSError as exc:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        return exc
    return None

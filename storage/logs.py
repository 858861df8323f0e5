"""Log lines for people or for machines, with the ids of what they are about.

``LABELFLEET_LOG=json`` (or ``--log-format json``) makes every line one JSON object: time, level,
logger, message, and whichever of run, invocation, worker, shard and attempt are known; further
fields as the line has them. The driver writes to stderr, workers into Ray's worker logs. Plain text
is the default; there the ids stand behind the message.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from storage.urls import unsigned

VARIABLE = "LABELFLEET_LOG"
IDS = ("run", "invocation", "worker", "shard", "attempt")
LogFormat = Literal["text", "json"]

_process: dict[str, str] = {}
_here: ContextVar[dict[str, str] | None] = ContextVar("labelfleet_log_ids", default=None)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "_ray_timestamp_ns",  # what formatters and Ray add
}


def log_format() -> LogFormat:
    """What the environment asks for."""
    return "json" if os.environ.get(VARIABLE, "").lower() == "json" else "text"


def set_up_logging(
    kind: LogFormat,
    *,
    stream: TextIO | None = None,
    clean: Callable[[str], str] = str,
    **ids: str,
) -> None:
    """Send this process's log to one place.

    Args:
        kind: with ``json``, our own lines from INFO on are written; with ``text`` from WARNING on.
        stream: None: stderr.
        clean: makes a text line fit for where it is read; JSON escapes by itself.
        ids: known for the whole process.
    """
    handler = _Handler(stream)
    handler.setFormatter(JsonLines() if kind == "json" else TextLines(clean))
    root = logging.getLogger()
    for before in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(before)
    root.addHandler(handler)
    # Ours only: what botocore and httpx say below WARNING has credentials and whole URLs in it.
    logging.getLogger("labelfleet").setLevel(logging.INFO if kind == "json" else logging.NOTSET)
    _process.clear()
    _process.update(ids)


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Lines logged inside, by this thread, carry these ids too."""
    token = _here.set({**(_here.get() or {}), **ids})
    try:
        yield
    finally:
        _here.reset(token)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours; without a stream of its own it writes to whatever stderr is at the moment."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._follows_stderr = stream is None

    def emit(self, record: logging.LogRecord) -> None:
        if self._follows_stderr:
            self.stream = sys.stderr
        super().emit(record)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    own = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    known = {**_process, **(_here.get() or {}), **own}
    return {name: known[name] for name in sorted(known, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return (IDS.index(name), "") if name in IDS else (len(IDS), name)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """As JSON; what is no JSON value by itself goes by its text."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": unsigned(record.getMessage()),
            **_fields(record),
        }
        if record.exc_info:
            fields["traceback"] = unsigned(self.formatException(record.exc_info))
        return json.dumps(fields, default=str)


class TextLines(logging.Formatter):
    """Time, level, logger, message; ids behind it."""

    def __init__(self, clean: Callable[[str], str] = str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._clean = clean

    def format(self, record: logging.LogRecord) -> str:
        """Its message and its traceback hold names of files and images."""
        return self._clean(unsigned(super().format(record)))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without a traceback."""
        ids = " ".join(f"{k}={v}" for k, v in _fields(record).items() if k in IDS)
        return super().formatMessage(record) + (f" [{ids}]" if ids else "")

"""Logging as text or JSON lines, with the ids of the run, worker and shard concerned.

``LABELFLEET_LOG=json`` (or ``--log-format json``) makes every line one JSON object: time, level,
logger, message, and those of run, invocation, worker, shard and attempt that are known, plus any
further fields of the record. The driver writes to stderr, workers into Ray's worker logs. Plain
text is the default; there the ids follow the message.
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
    """Return the log format that the environment asks for."""
    return "json" if os.environ.get(VARIABLE, "").lower() == "json" else "text"


def set_up_logging(
    kind: LogFormat,
    *,
    stream: TextIO | None = None,
    clean: Callable[[str], str] = str,
    **ids: str,
) -> None:
    """Configure this process's logging.

    Args:
        kind: ``json`` writes our own records from INFO up, ``text`` from WARNING up.
        stream: None: stderr.
        clean: sanitises a text line for its destination; JSON escapes by itself.
        ids: ids that apply to the whole process.
    """
    handler = _Handler(stream)
    handler.setFormatter(JsonLines() if kind == "json" else TextLines(clean))
    root = logging.getLogger()
    for before in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(before)
    root.addHandler(handler)
    # Ours only: botocore and httpx log credentials and whole URLs below WARNING.
    logging.getLogger("labelfleet").setLevel(logging.INFO if kind == "json" else logging.NOTSET)
    _process.clear()
    _process.update(ids)


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Add these ids to every line that this thread logs inside the block."""
    token = _here.set({**(_here.get() or {}), **ids})
    try:
        yield
    finally:
        _here.reset(token)


class _Handler(logging.StreamHandler[TextIO]):
    """Our handler; without a stream of its own it writes to the current ``sys.stderr``."""

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
    """Format each record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; values that JSON cannot hold are written as text."""
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
    """Format each record as time, level, logger and message, followed by its ids."""

    def __init__(self, clean: Callable[[str], str] = str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._clean = clean

    def format(self, record: logging.LogRecord) -> str:
        """Return the cleaned line: messages and tracebacks contain names of files and images."""
        return self._clean(unsigned(super().format(record)))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line without a traceback."""
        ids = " ".join(f"{k}={v}" for k, v in _fields(record).items() if k in IDS)
        return super().formatMessage(record) + (f" [{ids}]" if ids else "")

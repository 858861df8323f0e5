"""The console for all output meant for people; see ``terminal.harmless``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pipelines.display.terminal import harmless
from storage.logs import log_format


class HarmlessConsole(Console):
    """rich's console, which escapes every control character except rich's own, and folds what a
    table's column is too narrow for: rich would cut a URL or a figure there, and put … after it.
    Names stay as they are: rich would make an emoji of ``:car:``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """End the process as rich does, which would point stdout at /dev/null, though it may be
        stderr that has no reader any more; see ``streams.flushed``."""
        self.quiet = True
        raise SystemExit(1)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        options = options or self.options
        if options.overflow == "ellipsis" and not options.no_wrap:
            options = options.update(overflow="fold")
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


def unbroken(text: str) -> Text:
    """Return lines that keep their length, so that a command in them can be copied.

    They need a console that does not crop, as ``pipelines.cli.common.show`` prints.
    """
    return Text(text, no_wrap=True, overflow="ignore")


def say(text: str) -> None:
    """Print a line for people on stderr; log it where LABELFLEET_LOG asks for JSON."""
    if log_format() == "json":
        logging.getLogger("labelfleet").info("%s", text)
    else:
        HarmlessConsole(stderr=True).print(Text(text), soft_wrap=True)

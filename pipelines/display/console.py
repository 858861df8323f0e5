"""The console for all output meant for people; see ``terminal.harmless``."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pipelines.display.terminal import harmless
from storage.logs import log_format


class HarmlessConsole(Console):
    """rich's console, which escapes every control character except rich's own."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


def say(text: str) -> None:
    """Print a line for people on stderr; log it where LABELFLEET_LOG asks for JSON."""
    if log_format() == "json":
        logging.getLogger("labelfleet").info("%s", text)
    else:
        HarmlessConsole(stderr=True).print(Text(text), soft_wrap=True)

"""docs/commands.md, generated from the commands themselves so that it cannot drift.

Run ``python -m pipelines.cli.reference > docs/commands.md`` after a change; a test compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import typer.main
from typer.core import TyperCommand, TyperGroup

from pipelines.cli.main import app

_INTRO = """# Commands

<!-- Generated from the command line; do not edit. After a change:
     python -m pipelines.cli.reference > docs/commands.md -->

RUN is the URL of a run's output, CONFIG the path or URL of a YAML file
([configuration](configuration.md)). `--debug` on any command adds the traceback behind an error,
`--log-format json` makes logs machine-readable. Exit codes are in [operations](operations.md).
"""


def page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_INTRO, *_commands(typer.main.get_group(app), "labelfleet")])


def _commands(group: TyperGroup, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        whole = f"{path} {name}"
        if isinstance(command, TyperGroup):
            yield from _commands(command, whole)
        elif isinstance(command, TyperCommand):
            yield from _command(command, whole)


def _command(command: TyperCommand, path: str) -> Iterator[str]:
    context = command.context_class(command, info_name=path)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## `{path}`\n\n{_plain(command.help)}\n\n```\n{path} {usage}\n```\n"
    records = [r for p in command.get_params(context) if (r := p.get_help_record(context))]
    rows = [(names, said) for names, said in records if names != "--help"]
    if rows:
        yield "| argument or option | meaning |\n|---|---|"
        yield from (f"| `{_cell(names)}` | {_text(said)} |" for names, said in rows)
        yield ""
    if command.epilog:
        yield f"{_example(command.epilog)}\n"


def _plain(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _text(text: str) -> str:
    return _cell(text).replace("<", "&lt;")


def _example(epilog: str) -> str:
    said = _plain(epilog)
    start, _, command = said.partition("Example: ")
    return said if start or not command else f"Example: `{command}`"


if __name__ == "__main__":
    sys.stdout.write(page())

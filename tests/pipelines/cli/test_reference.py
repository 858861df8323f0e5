"""docs/commands.md is what the command line says of itself."""

from __future__ import annotations

from pathlib import Path

from pipelines.cli.reference import page

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_page_lists_every_command_as_it_is() -> None:
    assert (DOCS / "commands.md").read_text() == page(), "run `python -m pipelines.cli.reference`"


def test_subcommands_and_examples_are_in_it() -> None:
    said = page()
    assert "## `labelfleet review push`" in said
    assert "Example: `labelfleet run " in said

"""Commands that are built when they are called look and act as those that are built at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.core import TyperCommand, TyperGroup

from pipelines.cli.lazy import Unbuilt, lazy_group
from pipelines.cli.main import app, main


def names(group: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*above, name)
        if isinstance(command, TyperGroup):
            yield from names(command, (*above, name))


EVERY = list(names(typer.main.get_command(app)))


def help_of(group: Any, *path: str) -> str:
    context = group.make_context("labelfleet", [], resilient_parsing=True)
    for name in path:
        _, group, _ = group.resolve_command(context, [name])
        context = group.make_context(name, [], parent=context, resilient_parsing=True)
    return str(group.get_help(context))


@pytest.mark.slow
@pytest.mark.parametrize("path", [(), *EVERY], ids=" ".join)
def test_each_help_is_that_of_the_command_built_at_once(path: tuple[str, ...]) -> None:
    assert help_of(lazy_group(app), *path) == help_of(typer.main.get_command(app), *path)


def test_commands_are_the_same_in_the_same_order() -> None:
    whole = typer.main.get_command(app)
    assert isinstance(whole, TyperGroup)
    assert list(lazy_group(app).commands) == list(whole.commands)
    assert len(EVERY) > 30


def test_no_command_is_built_for_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(typer.main, "get_command_from_info", build)
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "relocate" in capsys.readouterr().out


def test_a_command_that_is_called_is_built_whole() -> None:
    group = lazy_group(app)
    assert all(isinstance(command, Unbuilt) for command in group.commands.values())
    context = group.make_context("labelfleet", [], resilient_parsing=True)
    _, command, rest = group.resolve_command(context, ["run", "cells.yaml"])
    assert isinstance(command, TyperCommand)
    assert not isinstance(command, Unbuilt)
    assert rest == ["cells.yaml"]
    assert {"config", "limit", "strict"} <= {parameter.name for parameter in command.params}

"""Build a command's parameters when the command is called: typer takes about 1 ms for each."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import typer.main
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandInfo, TyperInfo

Built = TyperCommand | TyperGroup


class Unbuilt(TyperCommand):
    """What a list of commands shows of one: its name and its help, without its parameters.

    Args:
        build: makes the command itself.
    """

    def __init__(self, name: str, build: Callable[[], Built], **shown: Any) -> None:
        super().__init__(name, **shown)
        self.build = build


def lazy_group(app: typer.Typer) -> TyperGroup:
    """Return the group that ``typer.main.get_command(app)`` returns, with unbuilt commands.

    The group's class must build what ``resolve_command`` finds; see ``built``.
    """
    bare = copy.copy(app)
    bare.registered_commands, bare.registered_groups = [], []
    group = cast(TyperGroup, typer.main.get_command(bare))
    group.commands = {one.name or "": one for one in _unbuilt(app)}
    return group


def built(command: Any) -> Any:
    """Return the command itself where it is unbuilt."""
    return command.build() if isinstance(command, Unbuilt) else command


def _unbuilt(app: typer.Typer) -> Iterator[Unbuilt]:
    for info in app.registered_commands:
        yield Unbuilt(
            info.name or typer.main.get_command_name(getattr(info.callback, "__name__", "")),
            lambda info=info: _command(app, info),  # type: ignore[misc]
            help=inspect.cleandoc(info.help) if info.help else inspect.getdoc(info.callback),
            short_help=info.short_help,
            hidden=info.hidden,
            deprecated=info.deprecated or False,
        )
    for group in app.registered_groups:
        solved = typer.main.solve_typer_info_defaults(group)
        yield Unbuilt(
            solved.name or "",
            lambda group=group: _group(app, group),  # type: ignore[misc]
            help=solved.help,
            short_help=solved.short_help,
            hidden=solved.hidden,
            deprecated=solved.deprecated or False,
        )


def _command(app: typer.Typer, info: CommandInfo) -> TyperCommand:
    command = typer.main.get_command_from_info(
        info,
        pretty_exceptions_short=app.pretty_exceptions_short,
        rich_markup_mode=app.rich_markup_mode,
    )
    return cast(TyperCommand, command)


def _group(app: typer.Typer, info: TyperInfo) -> TyperGroup:
    return typer.main.get_group_from_info(
        info,
        pretty_exceptions_short=app.pretty_exceptions_short,
        suggest_commands=app.suggest_commands,
        rich_markup_mode=app.rich_markup_mode,
    )

"""A config file: YAML, overridden by ``--set``, validated as a model with readable errors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.config.messages import explain
from storage.errors import BucketNotFound, ConfigError, ObjectNotFound, StorageError
from storage.objects.protocols import StorageOptions
from storage.stores.open import open_object, open_store
from storage.urls import shown_url

M = TypeVar("M", bound=BaseModel)
_SECRETS = ("notify",)
_DEEPEST = 100
Command = Literal["run", "train", "round", "suite"]
# Keys that the config of a command has, and that tell it from the others.
_TOLD_BY: dict[Command, frozenset[str]] = {
    "round": frozenset({"pool", "truth"}),
    "run": frozenset({"source", "model"}),
    "train": frozenset({"train", "val"}),
    "suite": frozenset({"sets"}),
}
# Keys that no other command has: a config with one of them is meant for it, whatever it lacks.
_OWN: dict[Command, frozenset[str]] = {
    "round": frozenset({"pool", "truth"}),
    "run": frozenset({"source"}),
    "suite": frozenset({"sets", "exports"}),
}
# What PyYAML raises besides its own errors: invalid dates, invalid numbers, a thousand
# brackets.
_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError)


RUN_PAGE = "docs/configuration.md"


def read_yaml(
    path: str, page: str = RUN_PAGE, *, options: StorageOptions | None = None
) -> dict[str, Any]:
    """Read a YAML mapping from a path or URL; ``page`` documents its fields.

    Raises ConfigError with line and column.
    """
    store, key = open_object(path, options)
    try:
        raw = store.get(key)
    except (ObjectNotFound, BucketNotFound) as exc:
        raise _no_file(path, exc, page) from exc
    loaded = load_yaml(raw, path)
    if not isinstance(loaded, dict):
        found = {type(None): "it is empty", list: "not a list"}.get(type(loaded), "not a text")
        raise ConfigError(
            f"{shown_url(path)} holds no config: `key: value` lines are expected, {found}",
            hint=f"{page} shows a config to start from",
        )
    return loaded


def overridden_yaml(
    path: str,
    overrides: Sequence[str],
    page: str = RUN_PAGE,
    *,
    command: Command | None = None,
) -> dict[str, Any]:
    """Read as ``read_yaml`` does, with ``key.sub=value`` texts put over it, or a single such text.

    Args:
        command: whose config is wanted; None: any.

    Raises:
        ConfigError: as ``read_yaml``, or the file is of another command.
    """
    fields = read_yaml(path, page)
    for override in (overrides,) if isinstance(overrides, str) else overrides:
        apply_override(fields, override)
    if command is not None:
        _refuse_other_command(fields, command, path)
    return fields


def _refuse_other_command(fields: Mapping[str, Any], wanted: Command, path: str) -> None:
    told = [name for name, keys in _TOLD_BY.items() if keys <= fields.keys()]
    if fields.keys() & _TOLD_BY["round"] and "train" in told:
        told.remove("train")  # a round has `train` and `val` as well
    if told and wanted not in told and not fields.keys() & _OWN.get(wanted, frozenset()):
        found = told[0]
        keys = ", ".join(f"`{key}`" for key in sorted(_TOLD_BY[found]))
        raise ConfigError(
            f"{shown_url(path)} is a config of `labelfleet {found}`, by its {keys}; a config of "
            f"`labelfleet {wanted}` is expected",
            hint=shlex.join(["labelfleet", found, shown_url(path)]),
        )


def _no_file(path: str, exc: StorageError, page: str) -> ConfigError:
    """Say what lies there in place of a config: a run's output, a folder, or nothing."""
    where = shown_url(path)
    try:
        first = next(iter(open_store(path).list()), None)
    except StorageError:
        first = None
    if first is None:
        hint = f"give the path or URL of a YAML file; {page} shows one"
        return ConfigError(f"{exc.message}, or is not a file", hint=hint)
    try:
        open_store(path).head("run.json")
    except StorageError:
        return ConfigError(
            f"{where} is a folder, and a config is a YAML file",
            hint=f"`{shlex.join(['labelfleet', 'init', where])}` writes a config for its images",
        )
    return ConfigError(
        f"{where} is the output of a run, and this command takes a config",
        hint="give the YAML file that the run was made with",
    )


def load_yaml(raw: bytes, path: str) -> Any:
    """Parse YAML's plain values; nothing is constructed or called. Raises ConfigError."""
    if _depth(raw) > _DEEPEST:  # PyYAML takes seconds to notice
        raise ConfigError(
            f"{shown_url(path)} is not YAML: it is nested too deeply",
            hint="check the brackets there",
        )
    try:
        return yaml.safe_load(raw)
    except _UNREADABLE as exc:
        raise ConfigError(
            f"{shown_url(path)} is not YAML{_where(exc)}",
            hint="check the indentation and brackets there",
        ) from exc


def _depth(raw: bytes) -> int:
    deepest = depth = 0
    for bracket in re.findall(rb"[\[{\]}]", raw):
        depth = max(0, depth + (1 if bracket in b"[{" else -1))
        deepest = max(deepest, depth)
    return deepest


def _where(exc: Exception) -> str:
    mark, problem = getattr(exc, "problem_mark", None), getattr(exc, "problem", None)
    if not isinstance(exc, yaml.YAMLError):
        deep = isinstance(exc, RecursionError)
        return ": it is nested too deeply" if deep else ": a value is not a valid date or number"
    if mark is None:
        return ": it is not text in UTF-8"
    return f": line {mark.line + 1}, column {mark.column + 1}: {problem}"


def apply_override(fields: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in nested dicts, in place. Raises ConfigError for another form."""
    key, separator, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not separator or not all([*parents, last]):
        raise ConfigError(
            f"--set {key!r}: key=value is expected", hint="such as --set model.score_floor=0.1"
        )
    if key.strip() in _SECRETS:
        raise ConfigError(
            f"--set {key.strip()}: it is a secret, and a command line is visible to all on the "
            "machine and recorded by Ray",
            hint="write it into the config file",
        )
    at = fields
    for parent in parents:
        if at.get(parent) is None:
            at[parent] = {}  # a section without keys
        at = at[parent]
        if not isinstance(at, dict):
            raise ConfigError(f"--set {key}: {parent} is a value, not a section")
    try:
        at[last] = yaml.safe_load(text)
    except _UNREADABLE as exc:
        raise ConfigError(
            f"--set {key}: the value is not YAML{_where(exc)}", hint="put it in quotes"
        ) from exc


def parse_config(kind: type[M], fields: dict[str, Any], *, where: str, page: str = RUN_PAGE) -> M:
    """Validate ``fields`` as ``kind``; raise a ConfigError with one line per problem.

    Args:
        where: what the fields are from, for the message.
        page: the page of docs/ that lists the fields.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        lines = "\n".join(f"  {problem}" for problem in explain(kind, exc.errors()))
        raise ConfigError(
            f"{shown_url(where)} cannot be used:\n{lines}",
            hint=f"{page} lists every field",
        ) from None  # pydantic's own text repeats the values, which may hold a secret

"""Describe the values that a config's fields accept, for error messages and the reference page."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_UNIONS = (Union, types.UnionType)
_ABOUT_A_KEY = ("extra_forbidden", "invalid_key")
_SAID_AS_IT_IS = ("value_error", "extra_forbidden", "missing")


def explain(kind: type[BaseModel], errors: Sequence[Any]) -> list[str]:
    """Return one line per field: its path, and what is wrong there.

    Args:
        kind: the config's root.
        errors: ``ValidationError.errors()``. Of a union they hold each member's complaint, of
            which only that of the intended member is useful.
    """
    by_field: dict[str, list[Any]] = {}
    for error in errors:
        by_field.setdefault(".".join(_names(kind, error)), []).append(error)
    # An error inside a section stands for the section's own.
    said = {p for p in by_field if not any(q.startswith(f"{p}.") for q in by_field)}
    return [_line(kind, path, by_field[path]) for path in by_field if path in said]


def _line(kind: type[BaseModel], path: str, errors: Sequence[Any]) -> str:
    error = next((e for e in errors if e["type"] in _SAID_AS_IT_IS), errors[0])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key; {_nearest(kind, path.split('.'))}"
    if error["type"] == "missing":
        return f"{path}: missing"
    if error["type"] == "value_error":
        said = str(error["msg"]).removeprefix("Value error, ")
        return f"{path}: {said}" if path else said
    found = _field(kind, path.split("."))
    if found is None:
        return f"{path}: a key is expected, which is a text" if path else "sections are expected"
    return f"{path}: {mismatch(found, error['input'])}"


def mismatch(field: FieldInfo, value: Any) -> str:
    """Return what a field accepts, and what it holds instead.

    Texts are never repeated, since they may hold a secret.
    """
    takes = expected(field)
    if isinstance(value, bool | int | float):
        quotes = "; put it in quotes" if "text" in takes or "name" in takes else ""
        return f"{takes} is expected, not {str(value).lower()}{quotes}"
    kinds = {dict: "a section", list: "a list", str: "this text", type(None): "nothing"}
    return f"{takes} is expected, not {kinds.get(type(value), 'this')}"


def expected(field: FieldInfo) -> str:
    """Return what a field accepts, such as ``auto` or a whole number from 1 to 4096``."""
    return _expected(field.annotation, field.metadata)


def _expected(annotation: Any, limits: Sequence[Any] = ()) -> str:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _expected(members[0], [m for part in members[1:] for m in _flat(part)])
    if origin in _UNIONS:
        return " or ".join(_expected(m, limits) for m in members if m is not type(None))
    if origin is Literal:
        values = [f"`{member}`" for member in members]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is tuple:
        if members[-1] is Ellipsis:
            if section_in(members[0]) is not None:
                return "a list of sections"
            return f"a list of {_several(members[0])}"
        return f"a list of {len(members)} {_several(members[0])}"
    if origin is dict:
        return "a mapping of names"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with {', '.join(f'`{name}`' for name in annotation.model_fields)}"
    named = next((limit for limit in limits if isinstance(limit, str)), "a text")
    plain = {int: "a whole number", float: "a number", bool: "true or false"}
    return plain.get(annotation, named) + _range(limits)


def _several(annotation: Any) -> str:
    """Return the plural of what is expected: ``whole numbers from 1 to 8,192``."""
    one = _expected(annotation).removeprefix("a ")
    if one.startswith("one of "):
        return f"any {one.removeprefix('one ')}"
    noun = next((n for n in ("whole number", "number", "text") if one.startswith(n)), one)
    return f"{noun}s{one[len(noun) :]}"


def _flat(part: Any) -> Sequence[Any]:
    return part.metadata if isinstance(part, FieldInfo) else [part]


def _range(limits: Sequence[Any]) -> str:
    low = next((m for m in limits if isinstance(m, Ge | Gt)), None)
    high = next((m for m in limits if isinstance(m, Le | Lt)), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f" from {low.ge:,} to {high.le:,}"
    words = [f"that matches {m.pattern}" for m in limits if getattr(m, "pattern", None)]
    if low is not None:
        words.append(f"of at least {low.ge:,}" if isinstance(low, Ge) else f"above {low.gt:,}")
    if high is not None:
        words.append(f"of at most {high.le:,}" if isinstance(high, Le) else f"below {high.lt:,}")
    return "".join(f" {word}" for word in words)


def _names(kind: type[BaseModel], error: Any) -> Iterator[str]:
    """Yield the keys of an error's location, without pydantic's tags for union members."""
    at: Any = kind
    for position, part in enumerate(error["loc"]):
        found = _step(at, part)
        if found is not None:
            yield str(part)
            at = found.annotation
        elif position == len(error["loc"]) - 1 and error["type"] in _ABOUT_A_KEY:
            yield str(part)


def _field(kind: type[BaseModel], names: Sequence[str]) -> FieldInfo | None:
    at: Any = kind
    found = None
    for name in names:
        found = _step(at, name)
        if found is None:
            return None
        at = found.annotation
    return found


def _step(annotation: Any, name: Any) -> FieldInfo | None:
    """Return the field that a key leads to: any of a mapping, a number in a list of sections."""
    if str(name).isdigit() and section_in(item := _item_in(annotation)) is not None:
        return FieldInfo(annotation=item)
    section = section_in(annotation)
    if section is not None:
        return section.model_fields.get(name)
    if get_origin(annotation) is dict:
        return FieldInfo(annotation=get_args(annotation)[1])
    return None


def _item_in(annotation: Any) -> Any:
    """Return what the items of a list are, where a field takes one; else None."""
    if get_origin(annotation) is tuple and get_args(annotation)[-1] is Ellipsis:
        return get_args(annotation)[0]
    if get_origin(annotation) in (*_UNIONS, Annotated):
        found = (_item_in(a) for a in get_args(annotation))
        return next((item for item in found if item is not None), None)
    return None


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field's annotation is, or names among others."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (*_UNIONS, Annotated):
        return next((s for a in get_args(annotation) if (s := section_in(a))), None)
    return None


def _nearest(kind: type[BaseModel], names: Sequence[str]) -> str:
    """Return the likely intended key: of this section by spelling, of another one by name."""
    above = _field(kind, names[:-1])
    section = section_in(above.annotation) if above is not None else kind
    valid = list(section.model_fields) if section is not None else []
    elsewhere = [path for path in _paths(kind) if path.split(".")[-1] == names[-1]]
    close = difflib.get_close_matches(names[-1], valid, n=1, cutoff=0.6)
    if elsewhere:
        return f"did you mean `{elsewhere[0]}`?"
    if close:
        return f"did you mean `{close[0]}`?"
    return f"valid are {', '.join(valid)}"


def _paths(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield prefix + name
        section = section_in(field.annotation)
        if section is not None:
            yield from _paths(section, f"{prefix}{name}.")

"""Single fields of COCO JSON as files in the wild write them: as a number, as text, or wrongly.

Every function raises a ValueError that names the found and the expected value; the caller adds the
location.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Xywh = tuple[float, float, float, float]
_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no", "")
_MISSING = object()


def entries(coco: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each entry of a top-level list with a name for messages, such as ``annotations[3]``."""
    listed = coco[name]
    if not isinstance(listed, list):
        raise ValueError(f"{name} is {_shown(listed)}, not a list")
    for number, entry in enumerate(listed):
        where = f"{name}[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {_shown(entry)}, not an object")
        yield f"{where} (id {entry['id']!r})" if "id" in entry else where, entry


def identifier(entry: Mapping[str, Any], key: str) -> int | str:
    """Return an id: an integer, also if written as ``7.0`` or ``"7"``; otherwise text."""
    value = _there(entry, key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {_shown(value)}, not an id")
    return value


def whole_number(entry: Mapping[str, Any], key: str) -> int:
    """Return an id that must be a number, such as a category's."""
    value = identifier(entry, key)
    if isinstance(value, str):
        raise ValueError(f"{key} is {_shown(value)}, not a whole number")
    return value


def text(entry: Mapping[str, Any], key: str) -> str:
    """Return non-empty text."""
    value = _there(entry, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} is {_shown(value)}, not a name")
    return value


def flag(entry: Mapping[str, Any], key: str) -> bool:
    """Return a flag; False if missing or null. Numbers and text are accepted."""
    value = entry.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    word = value.strip().casefold() if isinstance(value, str) else None
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError(f"{key} is {_shown(value)}, neither 0 nor 1")


def side(entry: Mapping[str, Any], key: str) -> int:
    """Return the width or height of an image in pixels; 0 if missing or null."""
    value = entry.get(key)
    if value is None:
        return 0
    number = _finite(value, key)
    if number < 0 or not number.is_integer():
        raise ValueError(f"{key} is {_shown(value)}, not a number of pixels")
    return int(number)


def area(entry: Mapping[str, Any], box: Xywh) -> float:
    """Return the stated area in pixels; the box's own if missing, null or 0."""
    value = entry.get("area")
    number = 0.0 if value is None else _finite(value, "area")
    if number < 0:
        raise ValueError(f"area is {_shown(value)}; it cannot be negative")
    return number or box[2] * box[3]


def bbox(entry: Mapping[str, Any]) -> Xywh:
    """Return ``bbox`` as x, y, width, height in pixels."""
    value = _there(entry, "bbox")
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"bbox is {_shown(value)}, not [x, y, width, height]")
    x, y, w, h = (_finite(one, "bbox") for one in value)
    if w < 0 or h < 0:
        raise ValueError(f"bbox is {_shown(value)}: its width or height is negative")
    return x, y, w, h


def _there(entry: Mapping[str, Any], key: str) -> Any:
    value = entry.get(key, _MISSING)
    if value is _MISSING or value is None:
        raise ValueError(f"{key} is {'missing' if value is _MISSING else 'null'}")
    return value


def _finite(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{key} holds {_shown(value)}, not a number")
    try:
        number = float(value)
    except ValueError as exc:
        raise ValueError(f"{key} holds {_shown(value)}, not a number") from exc
    if not math.isfinite(number):
        raise ValueError(f"{key} holds {_shown(value)}, not a finite number")
    return number


def _shown(value: Any) -> str:
    text_ = repr(value)
    return text_ if len(text_) <= 60 else f"{text_[:57]}…"

"""Pickled objects that real checkpoints carry, as plain values: OmegaConf, numpy, super-gradients.

Works on what pickle_values.py read; the libraries themselves are neither needed nor imported.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from storage.errors import CheckpointError
from workers.checkpoints.pickle_values import Call

_DEPTH = 64
_NUMBERS = {
    "f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?",
}  # fmt: skip
_PROCESSING = "super_gradients.training.processing"


def plain(value: Any) -> Any:
    """dict, list, str, number, None; an unknown ``Call`` is returned unchanged.

    ListConfig and DictConfig become list and dict, numpy scalars numbers or texts, numpy arrays
    flat lists, super-gradients' processing objects {class name: attributes}.

    Raises:
        CheckpointError: nested too deeply, or in itself.
    """
    return _plain(value, {}, 0)


def _plain(value: Any, seen: dict[int, Any], depth: int) -> Any:
    if not isinstance(value, Call | dict | list | tuple):
        return value
    if depth > _DEPTH:
        raise CheckpointError("the checkpoint's settings are nested too deeply, or in themselves")
    if id(value) not in seen:  # shared values are converted once, or they could multiply
        seen[id(value)] = _converted(value, seen, depth + 1)
    return seen[id(value)]


def _converted(value: Any, seen: dict[int, Any], depth: int) -> Any:
    if isinstance(value, dict):
        return {_key(k, seen, depth): _plain(v, seen, depth) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, seen, depth) for v in value]
    return _object(value, seen, depth)


def _key(key: Any, seen: dict[int, Any], depth: int) -> Any:
    """Return a key as a plain value, or unchanged if the result cannot be a key."""
    found = _plain(key, seen, depth)
    return found if isinstance(found, str | bytes | int | float | None) else key


def _object(call: Call, seen: dict[int, Any], depth: int) -> Any:
    if call.target is None:
        return call
    module, name = call.target.module, call.target.name
    state = call.state if isinstance(call.state, dict) else {}
    if module in ("collections", "builtins", "__builtin__"):
        return _container(call, seen, depth)
    if module.startswith("omegaconf."):
        return _plain(state.get("_content", state.get("_val", call)), seen, depth)
    if module == "_codecs" and name == "encode":
        return _encoded(call)
    if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        return _numpy(call, seen, depth)
    if module.startswith(_PROCESSING):
        return {name: _plain(state, seen, depth)}
    return call


def _container(call: Call, seen: dict[int, Any], depth: int) -> Any:
    name = call.target.name if call.target else ""
    if name in ("OrderedDict", "defaultdict", "dict"):
        pairs = call.args[0] if call.args and isinstance(call.args[0], list) else []
        items = {p[0]: p[1] for p in pairs if isinstance(p, list | tuple) and len(p) == 2}
        return _plain({**items, **call.items}, seen, depth)
    if name in ("list", "tuple", "set", "frozenset") and len(call.args) == 1:
        return _plain(call.args[0], seen, depth)
    return call


def _encoded(call: Call) -> Any:
    """Decode bytes as written by protocol 2."""
    if len(call.args) == 2 and isinstance(call.args[0], str) and call.args[1] == "latin1":
        return call.args[0].encode("latin1", "replace")
    return call


def _numpy(call: Call, seen: dict[int, Any], depth: int) -> Any:
    name = call.target.name if call.target else ""
    if name == "scalar" and len(call.args) == 2:
        values = _values(call.args[0], call.args[1])
        return values[0] if len(values) == 1 else call
    if name == "_reconstruct" and isinstance(call.state, tuple) and len(call.state) == 5:
        dtype, content = call.state[2], call.state[4]
        if isinstance(content, list):  # an array of objects is pickled as their list
            return [_plain(value, seen, depth) for value in content]
        return _values(dtype, content)
    return call


def _values(dtype: Any, raw: Any) -> list[Any]:
    """Return the little-endian numbers or the texts in an array's bytes, flat; [] for other
    dtypes."""
    raw = _encoded(raw) if isinstance(raw, Call) else raw
    code = dtype.args[0] if isinstance(dtype, Call) and dtype.args else None
    if not isinstance(code, str) or not isinstance(raw, bytes) or _is_big_endian(dtype):
        return []
    if text := re.fullmatch(r"([US])([1-9][0-9]{0,5})", code):
        return _texts(raw, text[1], int(text[2]))
    form = _NUMBERS.get(code)
    if form is None or len(raw) % struct.calcsize(form):
        return []
    return [n for (n,) in struct.iter_unpack("<" + form, raw)]


def _is_big_endian(dtype: Call) -> bool:
    state = dtype.state
    return isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">")


def _texts(raw: bytes, kind: str, length: int) -> list[str]:
    """numpy pads texts with zeros: U holds four bytes a character, S one."""
    width, encoding = (4 * length, "utf-32-le") if kind == "U" else (length, "utf-8")
    if len(raw) % width:
        return []
    pieces = (raw[start : start + width] for start in range(0, len(raw), width))
    return [piece.decode(encoding, "replace").rstrip("\0") for piece in pieces]

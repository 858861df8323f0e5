"""Pickled objects that real checkpoints carry, as plain values: OmegaConf, numpy, super-gradients.

Works on what pickle_values.py read; the libraries themselves are neither needed nor imported.
"""

from __future__ import annotations

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
    """dict, list, str, number, None; a ``Call`` that is not known stays what it is.

    ListConfig and DictConfig become list and dict, numpy scalars and arrays numbers and lists,
    super-gradients' processing objects {class name: attributes}.

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
        return {k: _plain(v, seen, depth) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, seen, depth) for v in value]
    return _object(value, seen, depth)


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
        return _numpy(call)
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
    """How protocol 2 writes bytes."""
    if len(call.args) == 2 and isinstance(call.args[0], str) and call.args[1] == "latin1":
        return call.args[0].encode("latin1", "replace")
    return call


def _numpy(call: Call) -> Any:
    name = call.target.name if call.target else ""
    if name == "scalar" and len(call.args) == 2:
        numbers = _numbers(call.args[0], call.args[1])
        return numbers[0] if len(numbers) == 1 else call
    if name == "_reconstruct" and isinstance(call.state, tuple) and len(call.state) == 5:
        return _numbers(call.state[2], call.state[4])
    return call


def _numbers(dtype: Any, raw: Any) -> list[Any]:
    """The little-endian numbers in an array's bytes, flat; [] for other dtypes."""
    raw = _encoded(raw) if isinstance(raw, Call) else raw
    code = dtype.args[0] if isinstance(dtype, Call) and dtype.args else None
    form = _NUMBERS.get(code) if isinstance(code, str) else None
    if form is None or not isinstance(raw, bytes) or len(raw) % struct.calcsize(form):
        return []
    return [n for (n,) in struct.iter_unpack("<" + form, raw)]

"""Reads a pickle as plain values. Nothing in it is ever imported, looked up or called.

The opcodes are interpreted here one by one. Where a pickle asks for a global, a call or an
object, an inert ``Call`` records what was asked, and the reader goes on; what a caller does not
recognise stays that record. So it does not matter which callables a file names.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any, BinaryIO


class MalformedPickle(ValueError):
    """Not a complete, well-formed pickle."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name the pickle refers to; never resolved."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """An object that the pickle asks to construct: its arguments and later state."""

    target: Global | None
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference to something outside the pickle; for torch, a storage."""

    key: Any


class _Mark:
    pass


_MARK = _Mark()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_IGNORED = {"PROTO", "FRAME"}
_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_SCALARS = (str, bytes, int, float, bool, type(None), Global, Call)


def read_pickle(file: BinaryIO) -> Any:
    """Return the value of the pickle that starts at the file's position, which moves behind it.

    Returns:
        dict, list, tuple, str, bytes, int, float, bool, None, and ``Global``, ``Call`` and
        ``Persistent`` for everything else. Values may be shared, and may contain themselves.

    Raises:
        MalformedPickle: damaged, truncated, or something else altogether.
    """
    machine = _Machine()
    try:
        for opcode, arg, _ in pickletools.genops(file):
            machine.step(opcode.name, arg)
        return machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError) as exc:
        # What malformed opcodes and operands of the wrong kind end in.
        raise MalformedPickle(f"not a readable pickle: {str(exc)[:120]}") from exc


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        if name in _PUSHED:
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name not in _IGNORED and name != "STOP":
            method = getattr(self, "op_" + name.lower(), None)
            if method is None:
                raise ValueError(f"opcode {name} has no place in a checkpoint")
            method(arg)

    def _to_mark(self) -> list[Any]:
        """Pop everything above the last mark, and the mark."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def op_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def op_pop(self, _: Any) -> None:
        self.stack.pop()

    def op_pop_mark(self, _: Any) -> None:
        self._to_mark()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # memo

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_put(self, arg: Any) -> None:
        self.memo[int(arg)] = self.stack[-1]

    def op_get(self, arg: Any) -> None:
        self.stack.append(self.memo[int(arg)])

    op_binput = op_long_binput = op_put
    op_binget = op_long_binget = op_get

    # containers

    def op_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def op_empty_list(self, _: Any) -> None:
        self.stack.append([])

    op_empty_set = op_empty_list

    def op_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def op_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._to_mark()))

    op_frozenset = op_tuple

    def op_list(self, _: Any) -> None:
        self.stack.append(self._to_mark())

    def op_tuple1(self, _: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_tuple2(self, _: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def op_tuple3(self, _: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def op_dict(self, _: Any) -> None:
        values = self._to_mark()
        target: dict[Any, Any] = {}
        self.stack.append(target)
        _set_items(target, values)

    def op_append(self, _: Any) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def op_appends(self, _: Any) -> None:
        values = self._to_mark()
        _extend(self.stack[-1], values)

    op_additems = op_appends

    def op_setitem(self, _: Any) -> None:
        pair = [self.stack.pop(), self.stack.pop()][::-1]
        _set_items(self.stack[-1], pair)

    def op_setitems(self, _: Any) -> None:
        values = self._to_mark()
        _set_items(self.stack[-1], values)

    # what another unpickler would resolve and call

    def op_global(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.stack.append(Global(module, name))

    def op_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(str(module), str(name)))

    def op_reduce(self, _: Any) -> None:
        args, target = self.stack.pop(), self.stack.pop()
        self._call(target, args)

    op_newobj = op_reduce

    def op_newobj_ex(self, _: Any) -> None:
        self.stack.pop()  # keyword arguments
        self.op_reduce(None)

    def op_inst(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self._call(Global(module, name), tuple(self._to_mark()))

    def op_obj(self, _: Any) -> None:
        target, *args = self._to_mark()
        self._call(target, tuple(args))

    def _call(self, target: Any, args: Any) -> None:
        known = target if isinstance(target, Global) else None
        self.stack.append(Call(known, args if isinstance(args, tuple) else ()))

    def op_build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Call):
            self.stack[-1].state = state

    def op_persid(self, arg: str) -> None:
        self.stack.append(Persistent(arg))

    def op_binpersid(self, _: Any) -> None:
        self.stack.append(Persistent(self.stack.pop()))


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, Call):
        target.elements.extend(values)
    else:
        target.extend(values)


def _set_items(target: Any, values: list[Any]) -> None:
    """Keys other than scalars are left out: hashing nested tuples can take for ever."""
    into = target.items if isinstance(target, Call) else target
    for key, value in zip(values[::2], values[1::2], strict=True):
        if isinstance(key, _SCALARS):
            into[key] = value

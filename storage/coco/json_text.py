"""JSON text of whole columns: what ``json.dumps`` writes value by value, by the column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Texts = NDArray[np.bytes_]
_GROUP = 10_000  # digits are looked up four at a time
_LARGEST = 1e9  # steps of a millionth are still whole in a float64
_TO_ESCAPE = r'[^ -~]|["\\]'


def rounded(values: NDArray[Any], digits: int) -> NDArray[np.float64]:
    """Return ``round(float(v), digits)`` of each value [N], to the bit.

    Scaled values next to the middle between two integers are left to ``round``: there the scaling
    itself may have decided.
    """
    exact = np.asarray(values, np.float64)
    scaled = exact * 10.0**digits
    out: NDArray[np.float64] = np.rint(scaled) / 10.0**digits
    doubtful = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-3 + 1e-15 * np.abs(scaled)
    out[doubtful] = [round(value, digits) for value in exact[doubtful].tolist()]
    return out


def lines(parts: Sequence[bytes | Texts]) -> bytearray:
    """Return the text of N lines, one after the other.

    Args:
        parts: of a line, in order: the same for all, or one for each, [N].

    Lines are made as records of one width, padded with NUL, which JSON never holds: what is left
    without it is the text. That takes less than half of the time that joining strings does.
    """
    kinds = [
        (str(n), f"S{len(p)}" if isinstance(p, bytes) else p.dtype) for n, p in enumerate(parts)
    ]
    count = next(len(part) for part in parts if not isinstance(part, bytes))
    text = bytearray(count * np.dtype(kinds).itemsize)
    records = np.frombuffer(text, kinds)
    for (name, _), part in zip(kinds, parts, strict=True):
        records[name] = part
    return text.translate(None, b"\0")


def whole_numbers(values: NDArray[np.int64]) -> list[Texts]:
    """Return the JSON of numbers [N], none of them negative, as parts of lines."""
    if not (values >= _GROUP).any():
        return [_groups().take(values)]
    above, last = np.divmod(values, _GROUP)
    return [*_leading(above), _groups().take(np.where(above > 0, last + _GROUP, last))]


def _leading(values: NDArray[np.int64]) -> list[Texts]:
    """Likewise of what stands before other digits: nothing for zero."""
    above, last = np.divmod(values, _GROUP)
    at = np.where(above > 0, last + _GROUP, last)
    at[values == 0] = 2 * _GROUP
    return [*(_leading(above) if above.any() else ()), _groups().take(at)]


def decimals(values: NDArray[np.float64], digits: Literal[3, 6]) -> list[Texts]:
    """Return the JSON of rounded numbers [N] as parts of lines.

    Args:
        values: what ``rounded`` returned for as many digits.
    """
    steps = np.rint(values * 10**digits)
    # Python writes small and large numbers with an exponent, and a zero may have a sign.
    small = (steps > 0) & (steps < 10 ** (digits - 4))
    if np.signbit(values).any() or (values >= _LARGEST).any() or small.any():
        return [np.array([json.dumps(value) for value in values.tolist()], np.bytes_)]
    rest: NDArray[np.int64]
    whole, rest = np.divmod(steps.astype(np.int64), 10**digits)
    if digits == 3:
        return [*whole_numbers(whole), _fractions().take(rest)]
    first, second = np.divmod(rest, 1000)
    at: NDArray[np.int64] = np.where(second > 0, first + 1000, first)
    return [*whole_numbers(whole), _fractions().take(at), _last_digits().take(second)]


@lru_cache(maxsize=1)
def _groups() -> Texts:
    """Up to four digits: without leading zeros, then with them; then nothing."""
    return np.array([*map(str, range(_GROUP)), *(f"{n:04}" for n in range(_GROUP)), ""], np.bytes_)


@lru_cache(maxsize=1)
def _fractions() -> Texts:
    """The point and up to three digits, by thousandths; then all three digits, always."""
    ends = [f"{n / 1000}"[1:] for n in range(1000)] + [f".{n:03}" for n in range(1000)]
    return np.array(ends, np.bytes_)


@lru_cache(maxsize=1)
def _last_digits() -> Texts:
    """The fourth to the sixth digit behind the point, by millionths."""
    return np.array([f"{n:03}".rstrip("0") for n in range(1000)], np.bytes_)


def known_strings(values: pa.Array) -> pa.Array:
    """Return what ``strings`` does, of a column in which few strings come again and again."""
    found = values.dictionary_encode()
    return strings(found.dictionary).take(found.indices).fill_null("null")


def strings(values: pa.Array) -> pa.Array:
    """Return the JSON of strings; null is null."""
    quoted = pc.binary_join_element_wise('"', values, '"', "")
    escaped = pc.fill_null(pc.match_substring_regex(values, _TO_ESCAPE), False)
    if pc.any(escaped).as_py():
        odd = [json.dumps(value) for value in values.filter(escaped).to_pylist()]
        quoted = pc.replace_with_mask(quoted, escaped, pa.array(odd, pa.string()))
    return pc.fill_null(quoted, "null")


def text_of(lines: pa.Array) -> memoryview:
    """Return the UTF-8 of strings, one after the other, without copying it."""
    _, offsets, text = lines.buffers()
    if text is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int32)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(text)[int(ends[0]) : int(ends[-1])]

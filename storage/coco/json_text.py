"""JSON text of whole columns: what ``json.dumps`` writes value by value, by the column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Texts = NDArray[np.bytes_]
Steps = NDArray[np.int32] | NDArray[np.int64]
_GROUP = 10_000  # digits are looked up four at a time
_LARGEST = 1e9  # steps of a millionth are still whole in a float64
_MOST_STEPS = 2**31 - 1
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


def steps_of(values: NDArray[np.float32], digits: Literal[3, 6]) -> NDArray[np.int32] | None:
    """Return ``round(float(v), digits)`` of each value, in steps of 10^-``digits``.

    A float32 times a million is exact in a float64, so its rounding is the only one. None where
    a value is negative, if only by its sign, too large for 31 bits, or NaN.
    """
    steps = values.astype(np.float64)
    steps *= 10**digits
    if np.signbit(steps).any() or not steps.max(initial=0) < _MOST_STEPS:
        return None
    return np.rint(steps, out=steps).astype(np.int32)


def lines(parts: Sequence[bytes | Texts]) -> bytearray:
    """Return the text of N lines, one after the other.

    Args:
        parts: of a line, in order: the same for all, or one for each, [N].

    Lines are made as records of one width, padded with NUL, which JSON never holds: what is left
    without it is the text. That takes less than half of the time that joining strings does.
    """
    blank = [part if isinstance(part, bytes) else bytes(part.itemsize) for part in parts]
    starts = accumulate(map(len, blank), initial=0)
    own = {at: part for at, part in zip(starts, parts, strict=False) if not isinstance(part, bytes)}
    text = bytearray(b"".join(blank)) * len(next(iter(own.values())))
    records = np.frombuffer(text, np.uint8).reshape(-1, sum(map(len, blank)))
    for at, part in own.items():
        records[:, at : at + part.itemsize].view(part.dtype)[:, 0] = part
    return text.translate(None, b"\0")


def whole_numbers(values: Steps) -> list[Texts]:
    """Return the JSON of numbers [N], none of them negative, as parts of lines."""
    most = values.max(initial=0)
    if most < _GROUP:
        return [_groups().take(values)]
    above, last = _divided(values, _GROUP)
    at = last + _GROUP * (above > 0)
    if most < _GROUP**2:
        return [(_eights("leading", 0).take(above) | _eights("groups", 4).take(at)).view("S8")]
    return [*_leading(above), _groups().take(at)]


def _leading(values: Steps) -> list[Texts]:
    """Likewise of what stands before other digits: nothing for zero."""
    above, last = _divided(values, _GROUP)
    at = last + _GROUP * (above > 0)
    at[values == 0] = 2 * _GROUP
    return [*(_leading(above) if above.any() else ()), _groups().take(at)]


def decimals(values: NDArray[np.float64], digits: Literal[3, 6]) -> list[Texts]:
    """Return the JSON of rounded numbers [N] as parts of lines.

    Args:
        values: what ``rounded`` returned for as many digits.
    """
    # Python writes large numbers with an exponent, and a zero may have a sign.
    if np.signbit(values).any() or not (values < _LARGEST).all():
        return [_one_by_one(values)]
    return decimals_of(np.rint(values * 10**digits).astype(np.int64), digits)


def decimals_of(steps: Steps, digits: Literal[3, 6]) -> list[Texts]:
    """Return the JSON of numbers, of any shape, as parts of lines, of the same shape.

    Args:
        steps: the numbers in steps of 10^-``digits``, from 0 to below ``10**(9 + digits)``.
    """
    whole, rest = _divided(steps, 10**digits)
    most = whole.max(initial=0)
    if digits == 3:
        if most < _GROUP:
            ends = _eights("thousandths", 4).take(rest)
            return [(_eights("groups", 0).take(whole) | ends).view("S8")]
        return [*whole_numbers(whole), _eights("thousandths", 0).take(rest).view("S8")]
    if ((steps > 0) & (steps < 100)).any():  # Python writes them with an exponent
        return [_one_by_one(steps / 10**digits)]
    first, second = _divided(rest, 1000)
    first += 1000 * (second > 0)
    at = 1 if most < 10 else 0
    ends = _eights("thousandths", at).take(first) | _eights("millionths", 4 + at).take(second)
    if most < 10:
        return [(_eights("groups", 0).take(whole) | ends).view("S8")]
    return [*whole_numbers(whole), ends.view("S8")]


def _one_by_one(values: NDArray[np.float64]) -> Texts:
    written = np.array([json.dumps(value) for value in values.ravel().tolist()], np.bytes_)
    return written.reshape(values.shape)


def _divided(values: Steps, by: int) -> tuple[Steps, Steps]:
    """Return what ``np.divmod`` does of numbers that are not negative, in a tenth of its time."""
    quotient = values // by
    return quotient, values - by * quotient


@lru_cache(maxsize=1)
def _groups() -> Texts:
    """Up to four digits: without leading zeros, then with them; then nothing."""
    return np.array([*map(str, range(_GROUP)), *(f"{n:04}" for n in range(_GROUP)), ""], np.bytes_)


@lru_cache(maxsize=8)
def _eights(
    kind: Literal["groups", "leading", "thousandths", "millionths"], at: int
) -> NDArray[np.uint64]:
    """Texts in eight bytes each, NUL but from byte ``at`` on; ``|`` puts two of them together.

    Args:
        kind: ``groups``; what is ``leading`` before such a group: nothing for zero; the point and
            up to three digits, by ``thousandths``, then all three digits always; the fourth to the
            sixth digit behind the point, by ``millionths``.
    """
    texts: list[bytes]
    if kind in ("groups", "leading"):
        texts = _groups().tolist()
        texts[0] = b"0" if kind == "groups" else b""
    elif kind == "thousandths":
        texts = [f"{n / 1000}"[1:].encode() for n in range(1000)]
        texts += [f".{n:03}".encode() for n in range(1000)]
    else:
        texts = [f"{n:03}".rstrip("0").encode() for n in range(1000)]
    return np.array([bytes(at) + text for text in texts], "S8").view(np.uint64)


def known_strings(values: pa.Array) -> pa.Array:
    """Return what ``strings`` does, of a column in which few strings come again and again."""
    found = values.dictionary_encode()
    return strings(found.dictionary).take(found.indices).fill_null("null")


def strings(values: pa.Array) -> pa.Array:
    """Return the JSON of strings; null is null."""
    quoted = pc.binary_join_element_wise('"', values, '"', "")
    if _is_plain(text_of(values)):  # a look at all bytes takes less than one at each string
        return pc.fill_null(quoted, "null")
    escaped = pc.fill_null(pc.match_substring_regex(values, _TO_ESCAPE), False)
    if pc.any(escaped).as_py():
        odd = [json.dumps(value) for value in values.filter(escaped).to_pylist()]
        quoted = pc.replace_with_mask(quoted, escaped, pa.array(odd, pa.string()))
    return pc.fill_null(quoted, "null")


def _is_plain(text: memoryview) -> bool:
    read = np.frombuffer(text, np.uint8)
    odd = (read < ord(" ")) | (read > ord("~")) | (read == ord('"')) | (read == ord("\\"))
    return not odd.any()


def text_of(lines: pa.Array) -> memoryview:
    """Return the UTF-8 of strings, one after the other, without copying it."""
    _, offsets, text = lines.buffers()
    if text is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int32)[lines.offset : lines.offset + len(lines) + 1]
    return memoryview(text)[int(ends[0]) : int(ends[-1])]

"""JSON text of whole columns: what ``json.dumps`` writes value by value, by the column."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

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


def floats(values: NDArray[np.float64]) -> pa.Array:
    """Return the JSON of finite numbers [N]."""
    text = pc.cast(pa.array(values), pa.string())
    size = np.abs(values)
    whole = np.rint(values) == values
    if whole.any():
        text = pc.if_else(pa.array(whole), pc.binary_join_element_wise(text, ".0", ""), text)
    # Python and Arrow turn to exponents at different sizes.
    odd = ((size < 1e-3) & (size > 0)) | (size >= 1e9)
    if odd.any():
        exact = pa.array([repr(value) for value in values[odd].tolist()], pa.string())
        text = pc.replace_with_mask(text, pa.array(odd), exact)
    return text


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

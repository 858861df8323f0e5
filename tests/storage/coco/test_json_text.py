"""JSON of columns against ``json.dumps`` of each value."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from storage.coco.json_text import (
    decimals,
    known_strings,
    lines,
    rounded,
    strings,
    text_of,
    whole_numbers,
)

_SIDES = st.floats(0, 1e5, width=32)
_MIDDLES = st.integers(0, 10**8).map(lambda n: n / 2000)  # between two thousandths, about


@given(st.lists(st.one_of(_SIDES, _MIDDLES, st.floats(-1e12, 1e12)), min_size=1))
def test_numbers_are_rounded_and_written_as_python_does(values: list[float]) -> None:
    found = decimals(rounded(np.array(values, np.float64), 3), 3)
    assert lines([*found, b"\n"]).decode().splitlines() == [
        json.dumps(round(value, 3)) for value in values
    ]


@given(st.lists(st.one_of(_SIDES, _MIDDLES), min_size=1))
@example([0.0, 0.001, 0.1, 0.12, 9_999.9995, 10_000.5, 123_456_789.125])
def test_sides_are_rounded_and_written_as_python_does(values: list[float]) -> None:
    found = decimals(rounded(np.array(values, np.float64), 3), 3)
    assert lines([*found, b"\n"]).decode().splitlines() == [
        json.dumps(round(value, 3)) for value in values
    ]


@given(st.lists(st.floats(0, 1, width=32), min_size=1))
@example([0.0, 1.0, 0.5, 0.0001, 0.123, 0.1234, 0.123456, 0.100001])
@example([0.5, 1e-6, 9.9e-5])
def test_scores_are_rounded_and_written_as_python_does(values: list[float]) -> None:
    found = decimals(rounded(np.array(values, np.float32), 6), 6)
    assert lines([*found, b"\n"]).decode().splitlines() == [
        json.dumps(round(value, 6)) for value in values
    ]


@given(st.lists(st.one_of(st.integers(0, 20_000), st.integers(0, 2**62)), min_size=1))
def test_whole_numbers_are_written_as_python_does(values: list[int]) -> None:
    found = lines([b"<", *whole_numbers(np.array(values)), b">"])
    assert found.decode() == "".join(f"<{value}>" for value in values)


@given(st.lists(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"])))))
def test_strings_are_written_as_python_does(values: list[str | None]) -> None:
    column = pa.array(values, pa.string())
    assert strings(column).to_pylist() == [json.dumps(value) for value in values]
    assert known_strings(column).to_pylist() == [json.dumps(value) for value in values]
    assert bytes(text_of(strings(column))).decode() == "".join(map(json.dumps, values))
    assert bytes(text_of(strings(column)[1:])).decode() == "".join(map(json.dumps, values[1:]))

"""JSON of columns against ``json.dumps`` of each value."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from storage.coco.json_text import floats, rounded, strings, text_of

_SIDES = st.floats(0, 1e5, width=32)
_MIDDLES = st.integers(0, 10**8).map(lambda n: n / 2000)  # between two thousandths, about


@given(st.lists(st.one_of(_SIDES, _MIDDLES, st.floats(-1e12, 1e12)), min_size=1))
def test_numbers_are_rounded_and_written_as_python_does(values: list[float]) -> None:
    found = rounded(np.array(values, np.float64), 3)
    assert floats(found).to_pylist() == [json.dumps(round(value, 3)) for value in values]
    assert floats(np.array(values)).to_pylist() == [json.dumps(value) for value in values]


@given(st.lists(st.floats(0, 1, width=32), min_size=1))
def test_scores_are_rounded_and_written_as_python_does(values: list[float]) -> None:
    found = floats(rounded(np.array(values, np.float32), 6))
    assert found.to_pylist() == [json.dumps(round(value, 6)) for value in values]


@given(st.lists(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"])))))
def test_strings_are_written_as_python_does(values: list[str | None]) -> None:
    column = pa.array(values, pa.string())
    assert strings(column).to_pylist() == [json.dumps(value) for value in values]
    assert bytes(text_of(strings(column))).decode() == "".join(map(json.dumps, values))
    assert bytes(text_of(strings(column)[1:])).decode() == "".join(map(json.dumps, values[1:]))

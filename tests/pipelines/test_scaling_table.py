"""docs/scaling.md shows what benchmarks/scaling_table.py computes, and what adds up."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scaling_table import Assumed, costs, markdown

DOCS = Path(__file__).parents[2] / "docs"


def test_the_docs_have_the_tables_as_computed() -> None:
    assert markdown(Assumed()) in (DOCS / "scaling.md").read_text()


def test_costs_add_up() -> None:
    *parts, (_, *together) = costs(Assumed(images=1e8, gpus=64))
    for column, total in enumerate(together):
        summed = sum(float(row[1 + column].replace(",", "")) for row in parts)
        assert abs(summed - float(total.replace(",", ""))) <= 0.5 * len(parts)

"""The table of ``fit``: on 80 columns no figure and no heading is wrapped, and none is ever cut."""

from __future__ import annotations

import pytest
from rich.console import Console

from pipelines.policy.fit import ClassFit, Fit
from pipelines.policy.fit_view import fit_table
from pipelines.policy.guarantee import ALL, ClassProof, Guaranteed
from pipelines.policy.policy import Policy
from pipelines.policy.statement import Guarantee

FOUND = Fit(
    Policy(), 363, 1_234_592, 0.1, 0.05, 0.9, 0.5,
    (

        ClassFit("Platelets", 1_234_567, 123_456, 0.5, 0.5, 0.71, 0.123, 99_999, 0.987, 1, True),
        ClassFit("traffic light, horizontal", 25, 4, 0.5, 0.2, 0.654, 0.321, 3, None, 0.5, False),
    ),
    "truth.json",
)  # fmt: skip


def printed(width: int) -> str:
    console = Console(width=width)
    with console.capture() as written:
        console.print(fit_table(FOUND, "policy.yaml"))
    assert max(len(line) for line in written.get().splitlines()) <= width
    assert "…" not in written.get()
    return written.get()


@pytest.mark.parametrize("width", [72, 60, 45])
def test_on_narrower_terminals_figures_fold_and_none_is_cut(width: int) -> None:
    assert digits(printed(width)) == digits(printed(80))


def digits(text: str) -> list[str]:
    return sorted(char for char in text if char.isdigit())


def test_every_figure_is_whole_at_80_columns() -> None:
    lines = printed(80).splitlines()
    (first,) = (line.split() for line in lines if "1,234,567" in line)
    assert first[1:] == ["1,234,567", "123,456", "0.710", "0.123", "99,999", "98.7", "100.0"]
    (second,) = (line.split() for line in lines if "0.654" in line)
    assert second[-7:] == ["25", "4", "0.654", "0.321", "3", "–", "50.0"]
    (headings,) = (line.split() for line in lines if "class  " in line)
    assert headings == ["class", "boxes", "right", "from", "below", "accepted", "%", "%"]


def proven(*, held: float | None) -> Guaranteed:
    """A guarantee of all boxes together: shown from ``held`` on, or not shown."""
    guarantee = None if held is None else Guarantee(
        target=0.9, confidence=0.9, by="all", thresholds={ALL: held}, model_sha256="0" * 64,
        precision="fp32", run="file:///run", images=100, audited=50, source="audit answers",
        assumes="",
    )  # fmt: skip
    proof = ClassProof("all", held, 80, 0.95, None if held else 40)
    return Guaranteed(Policy(), guarantee, proof, ())


def test_a_guarantee_says_which_of_the_two_tables_counts() -> None:
    classes = (ClassFit("ring", 100, 90, 95.0, 0.9, 0.71, 0.12, 80, 0.95, 0.9, True),)
    found = Fit(Policy(), 50, 100, 0.1, 0.05, 0.95, 0.9, classes, "audit answers")

    def shown(guaranteed: Guaranteed, written_to: str | None = "policy.yaml") -> str:
        console = Console(width=80)
        with console.capture() as written:
            console.print(fit_table(found, written_to, guaranteed))
        return " ".join(written.get().split())

    said = shown(proven(held=0.6))
    assert "1. fit of 50 images, by audit answers: `accept from` does not count, see 2" in said
    assert "2. guarantee" in said
    assert "What counts is table 2: `decide` accepts boxes from its row `all` on" in said
    said = shown(proven(held=None))
    assert "does not count" not in said
    assert "What counts is table 1: no threshold of table 2 was written." in said
    assert "Neither table counts: no policy was written." in shown(proven(held=None), None)

"""What commands print on a narrow terminal, or into a file: nothing is cut, and what may be copied
stays on its line."""

from __future__ import annotations

import io
import shlex

import pytest
from rich.console import Group, RenderableType
from rich.table import Table

from pipelines.cli.common import show
from pipelines.display.console import HarmlessConsole, unbroken
from pipelines.display.tables import figures_table, summary_table
from pipelines.labelling.view import run_table
from tests.pipelines.labelling.test_exit_codes import summary

URL = "file:///archive/microscopy/2026/november/plates/blood-cells/second-reading/labels/run"


def printed(shown: RenderableType, width: int) -> str:
    file = io.StringIO()
    HarmlessConsole(file=file, width=width).print(shown)
    return file.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80])
def test_a_url_in_a_table_is_folded_not_cut(width: int) -> None:
    shown = printed(summary_table("labels v0001", [("answers from", URL)]), width)
    assert "…" not in shown
    cells = [line.split("│")[2].strip() for line in shown.splitlines() if line.count("│") > 2]
    assert "".join(cells) == URL


def test_figures_are_whole_where_columns_are_narrow() -> None:
    table = Table("class", *(f"of class {n}" for n in range(9)))
    table.add_row("cells", *["1,234,567"] * 9)
    shown = printed(table, 50)
    assert "…" not in shown
    columns = zip(
        *(line.split("│")[2:11] for line in shown.splitlines() if "│" in line), strict=True
    )
    assert {"".join(cells).replace(" ", "") for cells in columns} == {"1,234,567"}


def test_a_name_that_looks_like_an_emoji_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = figures_table("of :car:", "class", ["a:b:"])
    table.add_row("a:100:x", "1")
    for shown in (table, "written: /data/a:100:x/:car:.yaml"):
        show(shown, {}, as_json=False)
    out = capsys.readouterr().out
    for name in ("of :car:", "a:b:", " a:100:x ", "written: /data/a:100:x/:car:.yaml\n"):
        assert name in out


@pytest.mark.parametrize("width", [30, 80])
def test_a_command_to_copy_stays_on_its_line(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    command = shlex.join(["labelfleet", "review", "push", URL])
    show(Group(summary_table("run", [("images", "200")]), unbroken(f"next: {command}")), {}, False)
    assert f"next: {command}\n" in capsys.readouterr().out
    show(f"written: a.yaml\nnext: {command}", {}, as_json=False)
    assert capsys.readouterr().out == f"written: a.yaml\nnext: {command}\n"


def test_a_run_names_its_next_command_whole_and_counts_what_it_does_not_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cut = [f"{n}.tar: ended in the middle" for n in range(12)]
    show(run_table(summary(routed=4, output=URL, truncated=cut)), {}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"routed: 4 images; next: labelfleet review push {URL}"
    assert "truncated: 9.tar: ended in the middle" in lines
    assert "… and 2 more tars" in lines

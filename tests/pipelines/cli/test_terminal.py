"""What came from outside is text on a terminal: it moves no cursor and changes no title."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pipelines.display.console import HarmlessConsole
from pipelines.display.terminal import harmless
from storage.logs import JsonLines, TextLines
from tests.support.patience import patient

HOSTILE = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;file:///etc/passwd\x1b\\x\x1b]8;;\x1b\\",
    "C1": "\x9b2Jgone",
    "overwritten": "safe.jpg\rEVIL",
    "back": "safe\b\b\b\bEVIL",
    "right to left": "gpj.\u202eexe",
    "isolate": "\u2066a\u2069",
    "NUL": "a\0b",
    "not UTF-8": "a\udcffb",
    "half a pair": "a\ud83db",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_control_character_passes(name: str) -> None:
    shown = harmless(f"a\tb\n{HOSTILE[name]}ü")
    assert shown.replace("\n", "").replace("\t", "").isprintable()
    assert shown.startswith("a\tb\n")
    assert shown.endswith("ü")


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_is_printed_on_the_console(name: str) -> None:
    text = HOSTILE[name]
    table = Table("name", title=Text(text))
    table.add_row(Text(text))
    file = io.StringIO()
    console = HarmlessConsole(file=file, force_terminal=False, width=200)
    console.print(Group(Text(text, "red"), table, Panel(Text(text))))
    console.print(text, markup=False)
    assert file.getvalue().replace("\n", "").isprintable()
    assert "EVIL" not in text or "EVIL" in file.getvalue()


def test_richs_own_colours_stay() -> None:
    file = io.StringIO()
    console = HarmlessConsole(file=file, force_terminal=True, color_system="standard")
    console.print(Text("fine", "red"), Text("\x1b[5m"))
    assert "\x1b[31mfine\x1b[0m" in file.getvalue()
    assert "\x1b[5m" not in file.getvalue()


def test_log_lines_and_their_tracebacks() -> None:
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    handler.setFormatter(TextLines(harmless))
    log = logging.Logger("x")
    log.addHandler(handler)
    try:
        raise ValueError("\x1b[31m.jpg")
    except ValueError:
        log.exception("about %s", "\x1b]0;owned\x07")
    assert "\x1b" not in file.getvalue()
    assert "\\x1b[31m.jpg" in file.getvalue()
    assert file.getvalue().count("\n") > 3  # a traceback keeps its lines


@pytest.mark.parametrize(
    "said",
    [
        "https://host/a/b.pth?X-Amz-Signature=hunter2&x=1",
        "FileNotFoundError: https://host/b.pth?sig=hunter2",
        "404, message='Not Found', url='http://127.0.0.1:1/gone.pth?Signature=hunter2'",
        'Could not connect to the endpoint URL: "http://me:hunter2@host:9000/bucket"',
        "s3://AKID:hunt/hunter2@bucket/x",
    ],
)
def test_what_drivers_say_of_urls_is_logged_without_their_secrets(said: str) -> None:
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed: %s", (said,), None)
    try:
        raise OSError(said)
    except OSError:
        record.exc_info = sys.exc_info()
    for shown in (TextLines(harmless).format(record), JsonLines().format(record)):
        assert "hunt" not in shown
        assert "failed: " in shown
        assert "host" in shown or "bucket" in shown or "gone.pth" in shown


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--debug"], ["--json"]])
def test_a_hostile_name_in_an_error_of_the_command_line(tmp_path: Path, extra: list[str]) -> None:
    folder = tmp_path / "\x1b]0;owned\x07\x1b[31m"
    command = [sys.executable, "-m", "pipelines.cli.main", "status", str(folder), *extra]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=patient(120)
    )
    assert done.returncode == 2
    assert "owned" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert "\x07" not in done.stderr + done.stdout

"""Where what is printed cannot be written: one line, and an exit code that says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import patient

ROOT = Path(__file__).resolve().parents[3]


def shell(command: str, here: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of bash, in which ``$LF`` is labelfleet."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LF": f"{sys.executable} -m pipelines.cli.main",
    }
    return subprocess.run(
        ["/bin/bash", "-c", command], cwd=here, env=environment, capture_output=True, text=True,
        timeout=patient(60), check=False,
    )  # fmt: skip


FULL = (
    "error: the result cannot be written to stdout: No space left on device\n"
    "  -> what the command did stays as it is\n"
)


@pytest.mark.parametrize("command", ["--version", "schema run"])
def test_a_full_disk_behind_stdout_is_said(command: str, tmp_path: Path) -> None:
    done = shell(f"PYTHONUNBUFFERED= $LF {command} > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, FULL)


def test_a_full_disk_behind_stdout_is_said_to_machines_as_well(tmp_path: Path) -> None:
    done = shell("PYTHONUNBUFFERED= $LF --log-format json --version > /dev/full", tmp_path)
    said = json.loads(done.stderr)
    assert said["message"] == FULL.splitlines()[0].removeprefix("error: ")
    assert (done.returncode, said["exit_code"]) == (1, 1)


@pytest.mark.parametrize("as_json", ["", "--json"])
def test_a_result_that_cannot_be_printed_is_an_error(as_json: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    done = shell(f"$LF init photos {as_json} > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, FULL)
    assert (tmp_path / "photos.yaml").exists()


@pytest.mark.parametrize(
    ("streams", "code"),
    [(">&-", 2), ("2>&-", 2), ("<&- >&- 2>&-", 2), ("> /dev/full", 2), ("2> /dev/full", 2)],
)
@pytest.mark.parametrize("as_json", ["", "--json"])
def test_an_error_keeps_its_code_wherever_it_goes(
    streams: str, code: int, as_json: str, tmp_path: Path
) -> None:
    done = shell(f"$LF status nowhere {as_json} {streams}", tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_a_closed_stdout_is_no_error(tmp_path: Path) -> None:
    done = shell("$LF --version >&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "code"),
    [("schema run", 1), ("frobnicate --json", 2), ("status nowhere --json", 2)],
)
def test_a_reader_that_ended_early_is_no_traceback(command: str, code: int, tmp_path: Path) -> None:
    done = shell(f"$LF {command} | true; echo ${{PIPESTATUS[0]}} >&2", tmp_path)
    assert done.stderr.splitlines()[-1] == str(code)
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


CHILD = """
import subprocess, sys
from pipelines.display.streams import open_closed_streams

open_closed_streams()
look = "import os, sys; [os.fstat(n) for n in range(3)]; open(sys.argv[1], 'w')"
subprocess.run([sys.executable, "-c", look, sys.argv[1]], check=True)
"""


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_child_process_has_the_closed_streams_as_well(streams: str, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(CHILD)
    shell(f"{sys.executable} parent.py found {streams}", tmp_path)
    assert (tmp_path / "found").exists()


def test_an_error_is_on_stdout_where_stderr_has_no_reader(tmp_path: Path) -> None:
    done = shell("{ $LF status nowhere --json 2>&3 > out; } 3>&1 | true", tmp_path)
    assert done.stderr == ""
    assert json.loads((tmp_path / "out").read_text())["exit_code"] == 2


IMPATIENT = """
import atexit, signal
import pipelines.cli.main as m
from pipelines.display.console import HarmlessConsole

printed = HarmlessConsole.print

def again(*_) -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)

def impatiently(*what, **how) -> None:
    again()
    printed(*what, **how)

HarmlessConsole.print = impatiently
atexit.register(again)

@m.app.command()
def wait(json: bool = False) -> None:
    raise KeyboardInterrupt  # a signal's may come in a destructor, where Python drops it

m.main()
"""


def test_a_second_ctrl_c_does_not_cut_short_what_the_first_one_says(tmp_path: Path) -> None:
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    done = shell(f"exec {sys.executable} impatient.py wait --json", tmp_path)
    said = "error: interrupted\n  -> run the same command to continue\n"
    assert (done.returncode, done.stderr) == (130, said)
    assert json.loads(done.stdout)["exit_code"] == 130


TALKING = """
import time
import pipelines.cli.main as m
from pipelines.display.console import say

@m.app.command()
def talk() -> None:
    time.sleep(1)
    say("a line of progress")

m.main()
"""


def test_progress_that_nobody_reads_any_more_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "talking.py").write_text(TALKING)
    told = shell(f"{sys.executable} talking.py talk", tmp_path)
    assert (told.returncode, told.stderr) == (0, "a line of progress\n")
    done = shell(
        f"{sys.executable} talking.py talk 2>&1 | true; echo ${{PIPESTATUS[0]}} >&2", tmp_path
    )
    assert done.stderr == "1\n"


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("open('/dev/full', 'wb', 0).write(b'1')", "no space left: No space left on device"),
        ("tempfile.gettempdir()", "no temporary folder can be made: No usable"),
    ],
    ids=["write", "no temporary folder"],
)
def test_a_full_disk_anywhere_is_no_bug_of_ours(fails: str, said: str, tmp_path: Path) -> None:
    code = (
        "import tempfile; from pipelines.cli import main as cli\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc']\n"
        f"cli.lazy_group = lambda app: lambda *_, **__: {fails}\n"
        "cli.main(['status', 'x'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=patient(60), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {said}")
    assert "point TMPDIR at" in done.stderr
    assert "bug" not in done.stderr

"""What people see while a run goes on: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines.dispatch.progress import watching
from pipelines.dispatch.tally import Tally

HOSTILE = "attempt failed: cells/[red]page[1][/].png [/bold] C:\\"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def tally(working_s: float = 10.0) -> Tally:
    return Tally(
        total=8, shards=3, counts={"ok": 290, "undecodable": 10}, quarantined=1, errors=4,
        workers_alive=2, workers_lost=1, working_s=working_s,
    )  # fmt: skip


def test_a_log_gets_a_plain_line_every_ten_seconds_and_no_control_codes() -> None:
    out, clock = console(terminal=False), Clock()
    with watching(console=out, clock=clock) as watcher:
        for clock.now_s in (1.0, 5.0, 9.9, 10.0, 15.0, 20.0, 29.0):
            watcher.update(tally(clock.now_s))
    lines = printed(out).splitlines()
    assert lines == [
        "4/8 shards, 300 images, 30.0/s, 2 actors, 10 not ok, 4 errors, 1 worker lost, "
        "1 quarantined",
        "4/8 shards, 300 images, 15.0/s, 2 actors, 10 not ok, 4 errors, 1 worker lost, "
        "1 quarantined",
    ]
    assert "\x1b" not in printed(out)


def test_a_terminal_gets_a_bar_with_shards_rate_and_what_went_wrong() -> None:
    out = console(terminal=True)
    with watching(console=out) as watcher:
        watcher.update(Tally())
        watcher.update(tally())
    shown = printed(out)
    for part in ("labelling", "4/8", "300 images", "2 actors", "10 not ok", "4 errors", "ETA"):
        assert part in shown


def test_until_a_worker_is_ready_it_says_so() -> None:
    out, clock = console(terminal=False), Clock()
    with watching(console=out, clock=clock) as watcher:
        clock.now_s = 11
        watcher.update(Tally())
    assert "starting workers" in printed(out)


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_in_names_are_text_and_no_markup(terminal: bool) -> None:
    out = console(terminal=terminal)
    with watching(console=out) as watcher:
        watcher.note(HOSTILE)
    assert HOSTILE in printed(out)


def test_a_long_note_stays_one_line_in_a_log() -> None:
    out = console(terminal=False)
    with watching(console=out) as watcher:
        watcher.note("word " * 200)
    assert len(printed(out).splitlines()) == 1


def test_by_default_it_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with watching() as watcher:
        watcher.note("lost worker-0")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "lost worker-0\n")

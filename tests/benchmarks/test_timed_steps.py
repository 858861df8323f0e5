"""The runner of the GPU day: every step ends, is judged, and is in the record."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_day import carry_out
from benchmarks.timed_steps import Outcome, Record, Step, read_figures
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]
BUDGET_S = 600.0


def python(name: str, code: str, limit_s: float = 120.0, **more: Any) -> Step:
    return Step(name, (sys.executable, "-c", code), limit_s, **more)


def run(folder: Path, *steps: Step, budget_s: float = BUDGET_S) -> tuple[int, list[dict[str, Any]]]:
    record = Record(folder / "day.json", {"card": "a card"}, [Outcome(s.name) for s in steps])
    code = carry_out(steps, record, budget_s, dict(os.environ))
    found = json.loads(record.path.read_text())
    assert found["finished"]
    assert found["facts"] == {"card": "a card"}
    assert found["good"] is (code == 0)
    assert [one["name"] for one in found["steps"]] == [step.name for step in steps]
    return code, found["steps"]


def gone(pid: int) -> bool:
    """Whether the process has ended, or does so soon: killed ones are reaped a moment later."""
    ends = time.monotonic() + 60
    stat = Path(f"/proc/{pid}/stat")
    while time.monotonic() < ends:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_steps_that_pass_with_their_figures_and_last_lines(tmp_path: Path) -> None:
    figures = tmp_path / "speed.json"
    found = {"unit": "images/s", "values": {"a": [1, 3, 2]}, "ratios": {"r": {"median": 0.5}}}
    code, (first, second) = run(
        tmp_path,
        python("plain", "for i in range(40): print(i)"),
        python("speed", f"open({str(figures)!r}, 'w').write({json.dumps(found)!r})",
               figures=figures),
    )  # fmt: skip
    assert code == 0
    assert (first["status"], second["status"]) == ("passed", "passed")
    assert first["output"] == [str(i) for i in range(25, 40)]
    assert second["figures"] == {"r": 0.5, "a, images/s": 2.0}
    table = (tmp_path / "day.md").read_text()
    assert "| speed | a, images/s | 2 |" in table
    assert "- card: a card" in table


def test_a_failed_step_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    code, (bad, missing, good) = run(
        tmp_path,
        python("bad", "raise SystemExit('the | reason')"),
        Step("missing", (str(tmp_path / "no_such_program"),), 10),
        python("good", "print('fine')"),
    )
    assert code == 1
    assert (bad["status"], bad["why"]) == ("failed", "exit code 1: the | reason")
    assert missing["status"] == "failed"
    assert "no_such_program" in missing["why"]
    assert good["status"] == "passed"
    assert "the \\| reason" in (tmp_path / "day.md").read_text()


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hang = (
        "import pathlib, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )
    limit_s = patient(3.0)
    code, (hung, after) = run(tmp_path, python("hung", hang, limit_s), python("after", "pass"))
    assert code == 1
    assert hung["status"] == "timed out"
    assert hung["output"] == ["started"]
    assert round(limit_s, 1) <= hung["seconds"] < 300
    assert after["status"] == "passed"
    assert gone(int(pid.read_text()))


def test_a_step_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)\n"
    )
    result, (step,) = run(tmp_path, python("leaves", code))
    assert result == 0
    assert gone(int(step["output"][-1]))


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_named_and_is_no_success(tmp_path: Path) -> None:
    code, (first, second) = run(
        tmp_path, python("first", "import time; time.sleep(600)"), python("second", "print(1)"),
        budget_s=9.0,
    )  # fmt: skip
    assert code == 1
    assert first["status"] == "timed out"
    # What of the budget was left when it began: a busy machine takes its time until then.
    waited = re.fullmatch(r"ended after ([\d.]+) s", first["why"])
    assert waited is not None
    assert 5.0 <= float(waited[1]) <= 9.0
    assert second["status"] == "not started"
    assert second["why"].startswith("0 of ")


def test_what_cannot_run_here_is_skipped_and_said(tmp_path: Path) -> None:
    code, steps = run(
        tmp_path,
        python("unable", "raise SystemExit(1)", unable="TensorRT is not installed"),
        python("says", "print('no second card'); raise SystemExit(77)"),
        python("good", "pass"),
    )
    assert code == 0
    assert [one["status"] for one in steps] == ["skipped", "skipped", "passed"]
    assert [one["why"] for one in steps] == ["TensorRT is not installed", "no second card", None]


def test_a_day_on_which_nothing_ran_is_no_success(tmp_path: Path) -> None:
    code, (step,) = run(tmp_path, python("unable", "pass", unable="needs a GPU"))
    assert (code, step["status"]) == (1, "skipped")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"values": {"a": []}}'])
def test_a_step_without_readable_figures_failed(tmp_path: Path, text: str | None) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text('{"values": {"old": [1]}}')  # an older run's must not count
    write = "pass" if text is None else f"open({str(figures)!r}, 'w').write({text!r})"
    code, (step,) = run(tmp_path, python("mute", write, figures=figures))
    assert (code, step["status"], step["figures"]) == (1, "failed", {})
    assert "figure" in step["why"]


def test_the_record_is_written_before_and_after_each_step(tmp_path: Path) -> None:
    show = (
        "import json, pathlib\n"
        f"found = json.loads(pathlib.Path({str(tmp_path / 'day.json')!r}).read_text())\n"
        "print(found['finished'], *[one['status'] for one in found['steps']], sep=';')\n"
    )
    _, steps = run(
        tmp_path, python("a", show), python("b", "raise SystemExit(3)"), python("c", show)
    )
    assert steps[0]["output"] == ["False;running;waiting;waiting"]
    assert steps[2]["output"] == ["False;passed;failed;running"]


def test_an_interrupted_day_says_so_and_ends_its_step(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import os, pathlib, sys\n"
        "from benchmarks.gpu_day import carry_out\n"
        "from benchmarks.timed_steps import Outcome, Record, Step\n"
        "inner = 'import os, pathlib, sys, time; '\n"
        "inner += 'pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)'\n"
        f"step = Step('long', (sys.executable, '-c', inner, {str(pid)!r}), 600)\n"
        f"record = Record(pathlib.Path({str(tmp_path / 'day.json')!r}), {{}}, [Outcome('long')])\n"
        "sys.exit(carry_out([step], record, 600, dict(os.environ)))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ends = time.monotonic() + patient(60)
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(patient(60)) == 130
    found = json.loads((tmp_path / "day.json").read_text())
    assert (found["finished"], found["good"]) == (False, False)
    assert (found["steps"][0]["status"], found["steps"][0]["why"]) == ("failed", "interrupted")
    assert gone(int(pid.read_text()))


SUITE = '<testsuites><testsuite tests="{}" skipped="{}" failures="0" errors="0"/></testsuites>'


def test_tests_that_were_all_skipped_did_not_pass(tmp_path: Path) -> None:
    def step(name: str, tests: int, skipped: int) -> Step:
        path = tmp_path / f"{name}.xml"
        text = SUITE.format(tests, skipped)
        return python(name, f"open({str(path)!r}, 'w').write({text!r})", figures=path)

    code, (some, none) = run(tmp_path, step("some", 5, 2), step("none", 3, 3))
    assert code == 0
    assert (some["status"], some["figures"]["tests run"]) == ("passed", 3)
    assert (none["status"], none["figures"]["tests skipped"]) == ("skipped", 3)


def test_accuracies_of_the_runtimes_benchmark_are_figures(tmp_path: Path) -> None:
    path = tmp_path / "runtimes.json"
    path.write_text('{"rows": {"torch fp16": {"map": 55.2}, "tensorrt int8": {"map": null}}}')
    assert read_figures(path) == {"torch fp16, mAP": 55.2}

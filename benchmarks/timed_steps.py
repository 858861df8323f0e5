"""Run commands one after the other within a time budget, and keep a record of every one of them.

Each step is a process group of its own with a time limit. The record is a JSON file that is written
before the first step and after each, so that a run that is cut off shows how far it came.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

SKIPPED = 77  # exit code of a step that cannot run here; its last line says why
_LAST_LINES = 15
_LEAST_S = 5.0  # a step is not started with less time than this
_ENDING_S = 5.0  # between SIGTERM and SIGKILL
Status = Literal["waiting", "running", "passed", "failed", "skipped", "timed out", "not started"]
GOOD: tuple[Status, ...] = ("passed", "skipped")


@dataclass(frozen=True, slots=True)
class Step:
    """One command.

    Attributes:
        name: a file name; its log is ``<name>.log``.
        limit_s: seconds after which it is ended.
        figures: the file that the command writes, JSON or JUnit's XML; None: it has no figures.
        unable: why it cannot run here; None: it can.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    figures: Path | None = None
    unable: str | None = None


@dataclass(slots=True)
class Outcome:
    """What became of a step.

    Attributes:
        why: of everything but ``passed``.
        figures: name → number, as its file has them.
        output: its last lines.
    """

    name: str
    status: Status = "waiting"
    seconds: float = 0.0
    why: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """The whole run; ``path`` holds it at any time."""

    path: Path
    facts: Mapping[str, Any]
    outcomes: list[Outcome]
    finished: bool = False

    @property
    def good(self) -> bool:
        """Whether it came to its end, no step failed, and one at least was carried out."""
        done = [one.status for one in self.outcomes]
        return self.finished and all(s in GOOD for s in done) and "passed" in done

    def write(self) -> None:
        """Replace the file in one go; a reader never sees half of it."""
        found = {
            "facts": dict(self.facts),
            "finished": self.finished,
            "good": self.good,
            "steps": [asdict(one) for one in self.outcomes],
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        part.replace(self.path)

    def table(self) -> str:
        """Return the record as Markdown: a line for each step, then one for each figure."""
        lines = [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", "| step | status | seconds | why |", "|---|---|---|---|"]
        lines += [
            f"| {one.name} | {one.status} | {one.seconds:.0f} | {_cell(one.why or '')} |"
            for one in self.outcomes
        ]
        lines += ["", "| step | figure | value |", "|---|---|---|"]
        lines += [
            f"| {one.name} | {_cell(name)} | {value:.4g} |"
            for one in self.outcomes
            for name, value in one.figures.items()
        ]
        return "\n".join(lines) + "\n"


def run_steps(
    steps: Sequence[Step],
    record: Record,
    *,
    budget_s: float,
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Run all steps in order; those for which no time is left are ``not started``.

    Args:
        record: its outcomes are those of ``steps``, in their order.
        budget_s: from now on, for all of them together.
    """
    ends = time.monotonic() + budget_s
    record.write()
    for step, outcome in zip(steps, record.outcomes, strict=True):
        left_s = ends - time.monotonic()
        if step.unable is not None:
            outcome.status, outcome.why = "skipped", step.unable
        elif left_s < _LEAST_S:
            outcome.status = "not started"
            outcome.why = f"{max(left_s, 0):.0f} of {budget_s:.0f} s were left"
        else:
            outcome.status = "running"
            record.write()
            say(f"{step.name}: at most {min(step.limit_s, left_s):.0f} s …")
            log = record.path.parent / f"{step.name}.log"
            run_step(step, outcome, log, min(step.limit_s, left_s), environment)
        record.write()
        say(f"{step.name}: {outcome.status}, {outcome.seconds:.0f} s" + _because(outcome))
    record.finished = True
    record.write()


def run_step(
    step: Step, outcome: Outcome, log: Path, limit_s: float, environment: Mapping[str, str]
) -> None:
    """Run one command to its end or its limit, and fill in its outcome."""
    if step.figures is not None:
        step.figures.unlink(missing_ok=True)  # an older run's
    began = time.monotonic()
    with log.open("wb") as sink:
        try:
            code = _exit_code(step.command, sink, limit_s, environment)
        except OSError as exc:
            outcome.status, outcome.why = "failed", f"not started: {exc}"
            return
    outcome.seconds = round(time.monotonic() - began, 1)
    lines = log.read_text(errors="replace").splitlines()
    outcome.output = [line[:300] for line in lines[-_LAST_LINES:]]
    last = next((line for line in reversed(lines) if line.strip()), "no output")[:300]
    if code is None:
        outcome.status, outcome.why = "timed out", f"ended after {limit_s:.3g} s"
    elif code == SKIPPED:
        outcome.status, outcome.why = "skipped", last
    elif code != 0:
        outcome.status, outcome.why = "failed", f"exit code {code}: {last}"
    else:
        _judge_figures(step, outcome)


def _exit_code(
    command: Sequence[str], sink: Any, limit_s: float, environment: Mapping[str, str]
) -> int | None:
    """Return the exit code; None: it took too long. Nothing of its group is left either way."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_S)
        return None
    finally:  # also when this process is interrupted
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judge_figures(step: Step, outcome: Outcome) -> None:
    """A step that ended well passed if it has figures and not all its tests were skipped."""
    outcome.status = "passed"
    if step.figures is None:
        return
    try:
        outcome.figures = read_figures(step.figures)
    except (OSError, ValueError, ET.ParseError) as exc:
        outcome.status, outcome.why = "failed", f"its figures cannot be read: {exc!s:.200}"
        return
    if outcome.figures.get("tests run", 1) == 0:
        outcome.status, outcome.why = "skipped", "every test of it was skipped; see its output"
    elif not outcome.figures:
        outcome.status, outcome.why = "failed", "it wrote no figure"


def read_figures(path: Path) -> dict[str, float]:
    """Return the figures of a benchmark's JSON or of JUnit's XML.

    Raises:
        OSError, ValueError, ET.ParseError: there are none, or they cannot be read.
    """
    if path.suffix == ".xml":
        counts = {"tests": 0, "skipped": 0, "failures": 0, "errors": 0}
        for suite in ET.parse(path).getroot().iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
        run = counts["tests"] - counts["skipped"]
        return {"tests run": run, "tests skipped": counts["skipped"]}
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not an object")
    if "rows" in found:  # benchmarks.runtimes
        return {f"{name}, mAP": row["map"] for name, row in found["rows"].items()
                if row.get("map") is not None}  # fmt: skip
    unit = found.get("unit", "")
    figures = {name: float(ratio["median"]) for name, ratio in found.get("ratios", {}).items()}
    for name, values in found.get("values", {}).items():
        figures[f"{name}, {unit}"] = float(median(values))
    return figures


def _because(outcome: Outcome) -> str:
    return f" ({outcome.why})" if outcome.why else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

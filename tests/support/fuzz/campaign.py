"""The fuzz campaign: ``python tests/support/fuzz/campaign.py``; the same seeds give the same cases.

Every case runs in a process of its own kind, watched: one that crashes or hangs is seen, its bytes
are kept below ``build/fuzz/``, and the next case goes on in a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
WORKER = ["-m", "tests.support.fuzz.worker"]
HANG_S = 60.0
MOST_MIB = 256.0  # a case may cost this much memory beyond what the process had


@dataclass(slots=True)
class Tally:
    """What the cases of one target came to."""

    said: Counter[str] = field(default_factory=Counter)
    worst_s: float = 0.0
    worst_seed: int = 0
    worst_mib: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(self.said.values())


class Worker:
    """A worker.py process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        )  # fmt: skip
        assert self._line(300.0) == b"ready\n"

    def run(self, target: str, seed: int) -> dict[str, Any]:
        """Return a case's answer; where there is none, what happened to the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{target}\t{seed}\n".encode())
        self._process.stdin.flush()
        line = self._line(HANG_S)
        if line is None:
            return {"said": "HANG", "seconds": HANG_S, "mib": 0.0, "error": f"{HANG_S} s"}
        if not line:
            code = self._process.wait()
            return {"said": "CRASH", "seconds": 0.0, "mib": 0.0, "error": f"exit code {code}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, timeout_s: float) -> bytes | None:
        stdout = self._process.stdout
        assert stdout is not None
        return stdout.readline() if select.select([stdout], [], [], timeout_s)[0] else None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def campaign(target: str, seeds: range, folder: Path | None, worker: Worker | None = None) -> Tally:
    """Run these seeds of one target; bugs, crashes, hangs and memory hogs are findings.

    Args:
        folder: where the bytes of findings go; None: they are not kept.
        worker: one to begin with, which is left as it is; None: a process of its own.
    """
    tally, lent = Tally(), worker
    worker = worker or Worker()
    try:
        for seed in seeds:
            answer = worker.run(target, seed)
            tally.said[answer["said"]] += 1
            if answer["seconds"] > tally.worst_s:
                tally.worst_s, tally.worst_seed = answer["seconds"], seed
            tally.worst_mib = max(tally.worst_mib, answer["mib"])
            problem = _problem(answer)
            if problem:
                tally.findings.append(f"{target} seed {seed}: {problem}")
                if folder is not None:
                    _keep(folder, target, seed, problem)
            if answer["said"] in ("CRASH", "HANG"):
                worker.close()
                worker = Worker()
    finally:
        if worker is not lent:
            worker.close()
    return tally


def _problem(answer: dict[str, Any]) -> str:
    if answer["said"].isupper():
        return f"{answer['said']}: {answer['error']}"
    return f"MEMORY: {answer['mib']:.0f} MiB" if answer["mib"] > MOST_MIB else ""


def _keep(folder: Path, target: str, seed: int, problem: str) -> None:
    from tests.support.fuzz.targets import TARGETS

    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{target.replace(' ', '-')}-{seed}"
    stem.with_suffix(".case").write_bytes(TARGETS[target].case(seed))
    stem.with_suffix(".txt").write_text(problem)


def lines(tallies: dict[str, Tally]) -> Iterator[str]:
    """Yield the summary, as a Markdown table."""
    yield "| reader | cases | what became of them | worst, s (seed) | most memory, MiB | findings |"
    yield "|---|---|---|---|---|---|"
    for name, t in tallies.items():
        said = ", ".join(f"{n:,} {what}" for what, n in t.said.most_common())
        yield (
            f"| {name} | {t.cases:,} | {said} | {t.worst_s:.2f} ({t.worst_seed:,}) "
            f"| {t.worst_mib:.0f} | {len(t.findings)} |"
        )


def main() -> None:
    from tests.support.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"any of: {', '.join(TARGETS)}; none: all")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, help="of each target; none: each target's own number")
    parser.add_argument("--keep", type=Path, default=ROOT / "build/fuzz")
    given = parser.parse_args()
    tallies = {}
    for name in given.targets or TARGETS:
        count = given.cases or TARGETS[name].cases
        tallies[name] = campaign(name, range(given.first, given.first + count), given.keep)
        print(f"{name}: {tallies[name].cases} cases, {len(tallies[name].findings)} findings",
              file=sys.stderr, flush=True)  # fmt: skip
    print("\n".join(lines(tallies)))
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    for finding in findings:
        print(finding)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()

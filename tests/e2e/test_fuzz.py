"""A seeded slice of the fuzz campaign (``make fuzz`` is all of it), and that it would notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fuzz import campaign as fuzz
from tests.support.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow
CASES = {"images": 150, "tars": 60}


@pytest.fixture(scope="module")
def worker() -> fuzz.Worker:
    return fuzz.Worker()


@pytest.mark.parametrize("target", TARGETS)
def test_rows_or_an_error_of_ours_and_nothing_else(worker: fuzz.Worker, target: str) -> None:
    # Seeds that the campaign in SECURITY.md did not have.
    seeds = range(1_000_000, 1_000_000 + CASES.get(target, 25))
    tally = fuzz.campaign(target, seeds, None, worker)
    assert tally.findings == []
    assert tally.cases == len(seeds)


PLANTED = """
import os, signal, sys, time
sys.argv = ["x"]
from tests.support.fuzz import targets as fuzz_targets, worker as fuzz_worker
def run(data, seed):
    if seed == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 2:
        time.sleep(600)
    if seed == 3:
        raise KeyError("x")
    if seed == 4:
        return str(len(bytearray(b"x") * (400 << 20)))
    return "fine"
fuzz_targets.TARGETS["images"] = fuzz_targets.Target("images", 1, lambda seed: b"", run)
fuzz_worker.main()
"""


def test_a_crash_a_hang_a_bug_and_a_bomb_are_each_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED)
    monkeypatch.setattr(fuzz, "WORKER", [str(planted)])
    monkeypatch.setattr(fuzz, "HANG_S", 15.0)
    tally = fuzz.campaign("images", range(6), tmp_path / "kept")
    assert dict(tally.said) == {"fine": 2, "CRASH": 1, "HANG": 1, "BUG": 1, str(400 << 20): 1}
    assert [finding.split(": ")[1] for finding in tally.findings] == [
        "CRASH", "HANG", "BUG", "MEMORY",
    ]  # fmt: skip
    assert len(list((tmp_path / "kept").glob("*.case"))) == 4

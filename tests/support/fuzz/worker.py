"""Runs fuzz cases in a process that may crash: ``target seed`` a line in, JSON a line out."""

from __future__ import annotations

import json
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.fuzz.targets import TARGETS

_warm: set[str] = set()
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kib(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def run(target: str, seed: int) -> dict[str, Any]:
    """One case: what became of it, seconds, and how far memory went up."""
    made = TARGETS[target].case(seed)
    if target not in _warm:  # imports and caches are not the case's
        _warm.add(target)
        with suppress(Exception):
            TARGETS[target].run(made, seed)
    _RESET.write_text("5")  # the peak begins anew
    before, began = _kib("VmRSS"), time.perf_counter()
    try:
        said, error = TARGETS[target].run(made, seed), ""
    except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
        said, error = "BUG", traceback.format_exc()
    seconds = time.perf_counter() - began
    grown = max(0, _kib("VmHWM") - before)
    return {"said": said, "seconds": seconds, "mib": grown / 1024, "error": error}


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # a codec that prints must not end up among the answers
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        target, seed = line.rstrip("\n").rsplit("\t", 1)
        print(json.dumps(run(target, int(seed))), file=out, flush=True)


if __name__ == "__main__":
    main()

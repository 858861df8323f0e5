"""How far a piece of work pushes this process's resident memory up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROC = Path("/proc/self")


class PeakMemory:
    """``growth()`` is the highest resident size since construction less that at construction."""

    def __init__(self) -> None:
        try:
            (PROC / "clear_refs").write_text("5")  # proc_pid_clear_refs(5): resets VmHWM
        except OSError as exc:
            pytest.skip(f"peak memory needs Linux's /proc/self/clear_refs: {exc}")
        self._before = self._status("VmRSS")

    def growth(self) -> int:
        """In bytes."""
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB$", (PROC / "status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

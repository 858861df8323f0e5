"""The processes of the Ray that a driver started for itself."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path


def descendants(pid: int) -> Iterator[int]:
    """Yield the pids of all processes below this one."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            yield int(stat.parent.name)
            yield from descendants(int(stat.parent.name))


def named(driver: subprocess.Popen[str], name: str) -> int:
    """Return the pid of a part of the driver's own Ray."""
    for pid in descendants(driver.pid):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue  # it ended in between
        if command.endswith(f"/{name}") or command.startswith(name):
            return pid
    raise AssertionError(f"no {name} below {driver.pid}")

"""What killed processes left goes; what living or recent ones have stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from workers.local_folders import own_folder

_KILLED = """
import os, signal, sys
from pathlib import Path
from workers.local_folders import own_folder
folder = own_folder("spool", Path(sys.argv[1]))
print(folder.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by_a_killed_process(parent: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(parent)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60,
    )  # fmt: skip
    return Path(done.stdout.strip())


def test_what_a_killed_process_left_is_removed_an_hour_later(tmp_path: Path) -> None:
    old, recent = (left_by_a_killed_process(tmp_path) for _ in range(2))
    alive = own_folder("spool", tmp_path)
    others = tmp_path / f"labelfleet-sg-{old.name.split('-')[2]}-x"
    others.mkdir()
    for folder in (old, Path(alive.name), others):
        os.utime(folder, (0, 0))
    with own_folder("spool", tmp_path) as mine:
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {recent.name, Path(alive.name).name, others.name, Path(mine).name}
    assert not Path(mine).exists()
    alive.cleanup()

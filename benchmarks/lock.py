"""What one image holds Python's interpreter lock for.

    python -m benchmarks.lock [--photos FOLDER] [--images 960] [--rounds 5] [--against CHECKOUT]

- ``held``: a worker labels on one core. From another core this process looks, some ten thousand
  times a second, at the flag by which CPython 3.11 knows that the lock is taken. Share of the looks
  × seconds an image: nothing is left out, nothing that releases the lock is counted.
- ``left out``: CPU time an image where JPEG decoding, large resizes and Parquet's encoding are left
  out (``benchmarks.cores --one lock``). It counts hashing, padding and colour conversion, which
  release the lock, and misses that pixels push the interpreter out of the caches.

As root, workers have real-time priority, so that ``held`` has no waits for a core; elsewhere it is
a bound from above. ``--against`` measures another checkout in turn. Linux and two cores.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import cores
from benchmarks.detectors import FreeDetector
from benchmarks.efficiency import options_for
from benchmarks.photos import photo_bytes, scratch, write_tars
from benchmarks.rounds import Report, Rounds, parser, plain, say
from benchmarks.worker import CORES, Worker

KINDS = ("held", "left out")
_SHARDS, _LOOK_S = 4, 1e-5
_UNIT = {"held": "held, ms", "left out": "left out, CPU ms"}


def main() -> None:
    """Measure this checkout, and another in turn."""
    made = parser(__doc__, images=960, rounds=5)
    made.add_argument("--against", type=Path, help="another checkout, of an older commit")
    made.add_argument("--child", choices=KINDS, help="be the worker of one measurement")
    options = made.parse_args()
    if options.child:
        work(options.child, photo_bytes(options.photos, options.images))
        return
    places = {"": Path(__file__).resolve().parent.parent}
    if options.against:
        places["against, "] = options.against.resolve()
    rounds = Rounds()
    for kind in KINDS:
        children = {f"{name}{_UNIT[kind]}": Child(kind, at, options) for name, at in places.items()}
        rounds.run({name: child.measure for name, child in children.items()}, options.rounds)
        for child in children.values():
            child.close()
    report = Report("lock", "ms an image", plain(options))
    report.values = rounds.values
    for name in rounds.values:
        report.add(name, rounds.per_round(lambda row, n=name: row[n]))  # type: ignore[misc]
    for kind in KINDS if options.against else ():
        new, old = _UNIT[kind], f"against, {_UNIT[kind]}"
        report.add(f"{kind} ÷ against", rounds.per_round(lambda r, a=new, b=old: r[a] / r[b]))  # type: ignore[misc]
    held_ms = rounds.median(_UNIT["held"])
    report.facts["images/s that the lock allows a worker"] = round(1e3 / held_ms)
    report.write(options.out)


class Child:
    """A worker in a process of its own, which labels whenever it is asked to."""

    def __init__(self, kind: str, checkout: Path, options: Any) -> None:
        self._kind = kind
        # Without the script's own folder among the modules; the checkout's are found by its path.
        command = [sys.executable, "-P", __file__, "--child", kind, "--images", str(options.images)]
        command += ["--photos", str(options.photos.resolve())] if options.photos else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
        )
        self._flag_at = int(self._line())

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _ask(self, word: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + b"\n")
        self._process.stdin.flush()

    def measure(self) -> float:
        """Return what one run over the photos gives."""
        self._ask(b"again")
        share = self._share_held() if self._kind == "held" else 1.0
        return share * float(self._line())

    def _share_held(self) -> float:
        """Return the share of the looks that find the lock taken, until the child says a line."""
        told, looks, held = select.poll(), 0, 0
        told.register(self._process.stdout, select.POLLIN)  # type: ignore[arg-type]  # it is a pipe
        memory = os.open(f"/proc/{self._process.pid}/mem", os.O_RDONLY)
        with core(-1, priority=11):
            while not told.poll(0):
                held += os.pread(memory, 4, self._flag_at)[0]
                looks += 1
                time.sleep(_LOOK_S)
        os.close(memory)
        return held / looks

    def close(self) -> None:
        """Let it end."""
        self._ask(b"")
        self._process.wait(60)


def work(kind: str, photos: list[bytes]) -> None:
    """Say where the flag lies; then label the photos whenever a line comes, and say the figure."""
    with scratch() as name, core(0, priority=10):
        folder = Path(name)
        write_tars(folder / "in", photos, max(1, len(photos) // _SHARDS))
        worker = Worker(FreeDetector(), options_for("cpu", CORES), folder)
        worker.label(folder / "in")
        parquet_s = cores.time_parquet() if kind == "left out" else []
        if kind == "left out":
            cores.leave_pixels_out(photos[0])
        say(str(flag_at()))
        while sys.stdin.readline().strip():
            parquet_s.clear()
            began_s, spent_s = time.perf_counter(), time.process_time()
            worker.label(folder / "in")
            took_s = time.perf_counter() - began_s
            cpu_s = time.process_time() - spent_s - sum(parquet_s)
            say(str((cpu_s if kind == "left out" else took_s) / len(photos) * 1e3))
        worker.close()


def flag_at() -> int:
    """Return where in this process the lock's flag lies, an int: 1 while a thread has the lock.

    It follows the thread that took the lock last (``_PyRuntime.ceval.gil`` of CPython 3.11), which
    is this one.
    """
    api = ctypes.pythonapi
    api.PyThreadState_Get.restype = ctypes.c_void_p
    start = ctypes.addressof(ctypes.c_char.in_dll(api, "_PyRuntime"))
    words = struct.unpack("128Q", ctypes.string_at(start, 128 * 8))
    return start + 8 * (words.index(api.PyThreadState_Get()) + 1)


@contextmanager
def core(index: int, priority: int) -> Iterator[None]:
    """Keep this thread, and those that it starts, on one core, before other work."""
    own = os.sched_getaffinity(0)
    policy = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setaffinity(0, {sorted(own)[index]})
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
        with suppress(PermissionError):
            os.sched_setscheduler(0, *policy)


if __name__ == "__main__":
    main()

"""Images/s, CPU, memory and a kill in the middle against the same job in Daft.

    python -m benchmarks.vs_daft [--photos FOLDER] [--models openvino-fp32,free] [--images 1820]

Daft: from_glob_path → download → decode_image → a class UDF (letterbox, the same detector) →
write_parquet, see benchmarks/daft_job.py. Ours: driver, dispatcher, pool and one actor on a local
Ray, as in ``vs_ray_data``. Both read the same loose JPEG files and are timed from when their model
is loaded. Daft lives in an environment of its own (``--environment``, made where it is missing: a
virtual environment with Daft, which finds everything else in this one). Daft writes boxes, scores
and classes; ours also digests, perceptual hashes, top-5 classes and DFL statistics.

Then the process that labels is killed at half time, once for each: ours goes on by itself; Daft's
is its only process, and the job is run again into the same folder. Reported are the images whose
rows are missing at the end, those with two rows, and those that the detector saw twice.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.daft_job import Noting
from benchmarks.models import checkpoint, variants
from benchmarks.photos import photo_bytes, scratch, write_files
from benchmarks.rounds import Ratio, Report, Rounds, chosen, parser, plain, say
from benchmarks.scaling import start_ray
from benchmarks.vs_ray_data import maker, ours
from benchmarks.worker import CORES
from storage.records import Detections
from storage.runs.annotations import read_tables
from storage.stores.open import open_store
from workers.detectors.protocol import Detector

VERSION = "0.7.26"
_METER = "ddd"  # CPU seconds when ready, and as of now; peak memory in MB


def main() -> None:
    made = parser(__doc__, images=1820, rounds=3)
    made.add_argument("--models", help="comma-separated; default: all that are here, and free")
    made.add_argument("--environment", type=Path, help="Daft's; default: below --out")
    made.add_argument("--slow-images", type=int, default=96, help="with a real model; default 96")
    made.add_argument("--no-kill", action="store_true", help="leave the killed runs out")
    options = made.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    python = environment(options.environment or options.out / f"daft-{VERSION}")
    report = Report("vs_daft", "images/s", plain(options))
    start_ray(cpus=CORES, object_store_mb=128)
    for name in chosen([*variants(options.device), "free"], options.models):
        count = options.images if name == "free" else min(options.images, options.slow_images)
        with scratch() as folder:
            photos = photo_bytes(options.photos, count)
            files = write_files(Path(folder) / "in", photos)
            sides = Sides(name, files, photos, python, options, Path(folder))
            compare(sides, options.rounds, report)
            if name == "free" and not options.no_kill:
                killed(sides, report)
    report.write(options.out)


def environment(folder: Path) -> Path:
    """Return the Python of an environment with Daft; make it where it is missing."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        uv = Path(sys.executable).with_name("uv")
        tool = str(uv) if uv.exists() else "uv"
        run([tool, "venv", "--quiet", "--python", sys.executable, str(folder)])
        run([tool, "pip", "install", "--quiet", "--python", str(python), f"daft=={VERSION}"])
        (here,) = (path for path in sys.path if path.endswith("site-packages"))
        (site,) = folder.absolute().glob("lib/python*/site-packages")
        (site / "labelfleet.pth").write_text(here + "\n")
    return python


def run(command: list[str]) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)


class Metered:
    """A detector that notes its process's CPU seconds and peak memory at every batch."""

    def __init__(self, detector: Detector, notes: Path) -> None:
        self._detector, self._ready_s = detector, time.process_time()
        self._file = os.open(notes, os.O_WRONLY | os.O_CREAT, 0o600)
        self.classes, self.preprocessing = detector.classes, detector.preprocessing

    def detect(self, batch: NDArray[np.uint8]) -> Sequence[Detections]:
        """See ``Detector.detect``."""
        self._note()
        return self._detector.detect(batch)

    def start(self, batch: NDArray[np.uint8]) -> Callable[[], Sequence[Detections]]:
        """See ``Detector.start``."""
        self._note()
        return self._detector.start(batch)

    def _note(self) -> None:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        os.pwrite(self._file, struct.pack(_METER, self._ready_s, time.process_time(), peak_mb), 0)


def read_meter(notes: Path) -> tuple[float, float, float]:
    """Return the CPU seconds of ``Metered``'s process when ready and at last, and its peak MB."""
    ready_s, last_s, peak_mb = struct.unpack(_METER, notes.read_bytes())
    return ready_s, last_s, peak_mb


class Sides:
    """The two ways to label the same files with the same detector."""

    def __init__(
        self,
        name: str,
        files: list[Path],
        photos: list[bytes],
        python: Path,
        options: Any,
        folder: Path,
    ) -> None:
        self.name, self.files, self.folder = name, files, folder
        self._python, self._options = python, options
        self.make = maker(name, photos, options)
        self._checkpoint = "" if name == "free" else str(checkpoint(options.out, photos).absolute())
        self.cpu_s: dict[str, list[float]] = {"ours": [], "daft": []}
        self.peak_mb: dict[str, list[float]] = {
            "ours, worker": [],
            "daft": [],
        }
        self.label: Callable[[Callable[[], Detector]], float] = lambda make: ours(
            files, make, options.device, folder
        )

    def ours(self) -> float:
        """Return images/s of the product."""
        notes, make = self.folder / f"cpu-{secrets.token_hex(4)}", self.make
        before_s = time.process_time()
        rate = self.label(lambda: Metered(make(), notes))
        driver_s = time.process_time() - before_s
        ready_s, last_s, peak_mb = read_meter(notes)
        self.cpu_s["ours"].append(driver_s + last_s - ready_s)
        self.peak_mb["ours, worker"].append(peak_mb)
        return rate

    def command(self, output: Path, *more: str) -> list[str]:
        """Return the command of Daft's job."""
        return [
            str(self._python), "-m", "benchmarks.daft_job", str(self.files[0].parent), str(output),
            "--model", self.name, "--checkpoint", self._checkpoint, *more,
        ]  # fmt: skip

    def daft(self) -> float:
        """Return images/s of Daft."""
        output = self.folder / f"daft-{secrets.token_hex(4)}"
        done = subprocess.run(
            self.command(output), capture_output=True, text=True, check=False, env=_environment()
        )
        if done.returncode:
            raise SystemExit(f"Daft's job failed:\n{done.stderr[-2000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        self.cpu_s["daft"].append(said["cpu_s"])
        self.peak_mb["daft"].append(said["peak_mb"])
        return len(self.files) / float(said["wall_s"])


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root, "DO_NOT_TRACK": "true", "DAFT_PROGRESS_BAR": "0"}


def compare(sides: Sides, count: int, report: Report) -> None:
    """Run the rounds of one detector, and report them."""
    name = sides.name
    rounds = Rounds()
    rounds.run({name: sides.ours, f"Daft, {name}": sides.daft}, count)
    report.values |= rounds.values
    ratio = rounds.per_round(lambda row: row[name] / row[f"Daft, {name}"])
    report.add(f"{name} ÷ Daft", ratio, at_least=1.5 if name == "free" else None)
    pairs = zip(sides.cpu_s["daft"], sides.cpu_s["ours"], strict=True)
    found = sorted(theirs / own for theirs, own in pairs)
    in_cpu = Ratio(statistics.median(found), found[0], found[-1])
    report.add(f"{name} ÷ Daft, in CPU time", in_cpu)
    per_image = {side: statistics.median(s) / len(sides.files) for side, s in sides.cpu_s.items()}
    peaks = {side: max(mb) for side, mb in sides.peak_mb.items()}
    report.facts[name] = {
        "CPU ms an image": {side: round(s * 1e3, 2) for side, s in per_image.items()},
        "peak memory, MB": {side: round(mb) for side, mb in peaks.items()},
    }
    say(f"  {report.facts[name]}")


def seen(notes: Path) -> int:
    """Return how many images a ``Noting`` saw."""
    return sum(notes.read_bytes()) if notes.exists() else 0


def killed(sides: Sides, report: Report) -> None:
    """Kill what labels in the middle, once for each side, and count."""
    told = {"ours": killed_ours(sides), "Daft": killed_daft(sides)}
    report.facts["killed in the middle"] = told
    for side, counts in told.items():
        say(f"  killed in the middle, {side}: {counts}")


def outcome(rows: Counter[str], images: int, saw: int) -> dict[str, int]:
    """Return what a killed job left."""
    return {
        "images": images,
        "without a row": images - len(rows),
        "with two rows": sum(count > 1 for count in rows.values()),
        "seen twice by the detector": max(0, saw - images),
    }


def killed_ours(sides: Sides) -> dict[str, int]:
    """Kill the worker's process once the detector has seen half of the images."""
    notes = sides.folder / "notes-ours"
    before = {path.name for path in sides.folder.glob("out-*")}
    ended = threading.Event()
    process = sides.folder / "worker.pid"

    def make() -> Detector:
        process.write_text(str(os.getpid()))
        return Noting(notes)

    def kill() -> None:
        while not ended.wait(0.02):
            if seen(notes) * 2 >= len(sides.files):
                os.kill(int(process.read_text()), signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        sides.label(make)
    finally:
        ended.set()
        killer.join()
    (output,) = (path for path in sides.folder.glob("out-*") if path.name not in before)
    store = open_store(str(output))
    rows: Counter[str] = Counter()
    for listed in store.list("annotations/"):
        for table in read_tables(store, listed.key, ["image_id"]):
            rows.update(table.column("image_id").to_pylist())
    return outcome(rows, len(sides.files), seen(notes))


def killed_daft(sides: Sides) -> dict[str, int]:
    """Kill the job once its detector has seen half of the images, and run it again."""
    notes, output = sides.folder / "notes-daft", sides.folder / "daft-killed"
    command = sides.command(output, "--notes", str(notes))
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL) as job:
        while job.poll() is None and seen(notes) * 2 < len(sides.files):
            time.sleep(0.02)
        job.kill()
    left = daft_rows(output)
    say(f"  Daft, killed: rows of {len(left)} of {len(sides.files)} images were written")
    subprocess.run(command, env=_environment(), stdout=subprocess.DEVNULL, check=True)
    return outcome(daft_rows(output), len(sides.files), seen(notes))


def daft_rows(output: Path) -> Counter[str]:
    """Return how often each image is in the readable files of Daft's output."""
    rows: Counter[str] = Counter()
    for path in output.glob("*.parquet") if output.exists() else ():
        try:
            table = pq.read_table(path)
        except (OSError, ValueError):
            continue  # cut off by the kill
        rows.update(found["path"] for found in table.column("found").to_pylist())
    return rows


if __name__ == "__main__":
    main()

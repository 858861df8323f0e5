"""How many cores a worker needs for a device of a given speed.

    python -m benchmarks.cores [--photos FOLDER] [--rates 300,1000,3000] [--images 960]

- images/s and CPU time an image of the free detector's pipeline on 1, 2, … cores, by affinity;
- the same with a detector that takes 1/rate of a second an image and no core, as a GPU does: the
  share of the device's speed that those cores reach, and the cores that it needs by CPU time;
- what one image holds the interpreter lock for, at most: the CPU time of the whole pipeline where
  JPEG decoding, resizing and Parquet's encoding, which release the lock, are left out. A worker on
  any number of cores is no faster than 1 / that.

Every measurement is a process of its own, which sees only its cores; sides run in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray

from benchmarks.actors import Sleeping
from benchmarks.detectors import FreeDetector
from benchmarks.efficiency import options_for
from benchmarks.photos import photo_bytes, scratch, write_tars
from benchmarks.rounds import Report, Rounds, parser, plain
from benchmarks.worker import CORES, Worker
from workers.detectors.protocol import Detector

_SHARDS = 4


def main() -> None:
    """Measure on 1 and 2 cores and so on, up to all there are, doubling."""
    made = parser(__doc__, images=960, rounds=3)
    made.add_argument("--rates", default="300,1000,3000", help="of the devices, images/s")
    made.add_argument("--one", help="be one measurement: free, lock, or a rate")
    options = made.parse_args()
    if options.one:
        photos = photo_bytes(options.photos, options.images)
        sys.stdout.write(json.dumps(measured(options.one, photos)) + "\n")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rates = [float(rate) for rate in options.rates.split(",")]
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count <= CORES]
    cpu_ms: dict[str, list[float]] = {}

    def side(kind: str, cores: int) -> float:
        said = child(kind, cores, options)
        cpu_ms.setdefault(f"{kind} on {cores}", []).append(said["cpu_ms"])
        return said["images_per_s"]

    sides: dict[str, Callable[[], float]] = {}
    for cores in counts:
        for kind in ("free", *options.rates.split(",")):
            sides[f"{kind} on {cores}"] = lambda k=kind, c=cores: side(k, c)  # type: ignore[misc]
    sides["lock on 1"] = lambda: side("lock", 1)
    rounds = Rounds()
    rounds.run(sides, options.rounds)
    report = Report("cores", "images/s", plain(options))
    report.values = rounds.values | {f"{name}, CPU ms": ms for name, ms in cpu_ms.items()}
    tell(report, rounds, cpu_ms, counts, rates)
    report.write(options.out)


def tell(
    report: Report,
    rounds: Rounds,
    cpu_ms: dict[str, list[float]],
    counts: list[int],
    rates: list[float],
) -> None:
    """Report speeds, shares of the devices' speeds, and the cores that these need."""
    for cores in counts:
        name = f"free on {cores}"
        report.add(f"images/s on {cores} cores", rounds.per_round(lambda row, n=name: row[n]))  # type: ignore[misc]
        for rate in rates:
            name = f"{rate:g} on {cores}"
            share = rounds.per_round(lambda row, n=name, r=rate: row[n] / r)  # type: ignore[misc]
            report.add(f"share of a device of {rate:g} images/s, {cores} cores", share)
    image_ms = float(np.median(cpu_ms[f"free on {counts[-1]}"]))
    lock_ms = float(np.median(cpu_ms["lock on 1"]))
    report.facts["CPU ms an image"] = round(image_ms, 3)
    report.facts["holds the interpreter lock, ms an image, at most"] = round(lock_ms, 3)
    report.facts["images/s that the lock allows a worker"] = round(1e3 / lock_ms)
    report.facts["cores by CPU time"] = {f"{r:g}": round(r * image_ms / 1e3, 1) for r in rates}
    for name, value in report.facts.items():
        sys.stdout.write(f"  {name}: {value}\n")


def child(kind: str, cores: int, options: Any) -> dict[str, float]:
    """Return what a process that sees so many cores measures."""
    command = [sys.executable, "-m", "benchmarks.cores", "--one", kind]
    command += ["--images", str(options.images)]
    if options.photos:
        command += ["--photos", str(options.photos)]
    own = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, own[:cores])  # of this thread, whose children inherit it
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, own)
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


class Timed(Sleeping):
    """Takes a fixed time an image of the usual input size, and no core."""

    def __init__(self, image_s: float) -> None:
        super().__init__(image_s)
        self.preprocessing = FreeDetector().preprocessing


def measured(kind: str, photos: list[bytes]) -> dict[str, float]:
    """Label the photos once to warm up, then once for the figures."""
    detector: Detector = FreeDetector() if kind in ("free", "lock") else Timed(1 / float(kind))
    with scratch() as name:
        folder = Path(name)
        write_tars(folder / "in", photos, max(1, len(photos) // _SHARDS))
        worker = Worker(detector, options_for("cpu", CORES), folder)
        worker.label(folder / "in")
        free_s = [0.0]
        if kind == "lock":
            leave_pixels_out(photos[0])
            free_s = time_parquet()
        began_s, spent_s = time.perf_counter(), time.process_time()
        worker.label(folder / "in")
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - spent_s - sum(free_s)
        worker.close()
    return {"images_per_s": len(photos) / took_s, "cpu_ms": cpu_s / len(photos) * 1e3}


def leave_pixels_out(photo: bytes) -> None:
    """Replace, in this process, JPEG decoding and the large resizes by what they made once."""
    pixels, resize = simplejpeg.decode_jpeg(photo), cv2.resize
    made: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def resized(source: Any, size: tuple[int, int], dst: Any = None, **how: Any) -> Any:
        if dst is not None:
            return dst
        if source is not pixels:
            return resize(source, size, **how)
        if size not in made:
            made[size] = resize(source, size, **how)
        return made[size]

    simplejpeg.decode_jpeg = lambda *_, **__: pixels
    cv2.resize = resized  # type: ignore[assignment]  # not all of its overloads


def time_parquet() -> list[float]:
    """Return a list to which each table that is encoded from now on adds its CPU seconds."""
    spent: list[float] = []
    write = pq.ParquetWriter.write_table

    def timed(writer: pq.ParquetWriter, table: pa.Table, *more: Any, **how: Any) -> None:
        began_s = time.thread_time()
        write(writer, table, *more, **how)
        spent.append(time.thread_time() - began_s)

    pq.ParquetWriter.write_table = timed
    return spent


if __name__ == "__main__":
    main()

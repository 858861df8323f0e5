"""What starting costs: the command line, a worker, and shards that hold next to nothing.

    python -m benchmarks.startup [--photos FOLDER] [--variants torch-fp32,openvino-fp32]

- `labelfleet --help`, from the shell;
- a worker of each runtime, from `python` to its first labelled image, in a process of its own;
- images/s of the free detector in shards of 1, 4 and 32 images against one of all of them: what
  a shard costs whatever is in it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.detectors import FreeDetector
from benchmarks.efficiency import options_for
from benchmarks.models import checkpoint, detector, variants
from benchmarks.photos import photo_bytes, scratch, write_tars
from benchmarks.rounds import Ratio, Report, Rounds, chosen, images_per_s, parser, plain
from benchmarks.worker import CORES, Worker

PER_SHARD = (1, 4, 32)


def main() -> None:
    made = parser(__doc__, images=512, rounds=5)
    made.add_argument("--variants", help="comma-separated; default: all that are here")
    made.add_argument("--one", metavar="VARIANT", help="be one worker's process")
    options = made.parse_args()
    photos = photo_bytes(options.photos, options.images)
    if options.one:
        first_image(options.one, photos, options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = checkpoint(options.out, photos)
    report = Report("startup", "s, images/s", plain(options))
    names = chosen(variants(options.device), options.variants)
    for name in names:
        detector(name, path, options.device)  # its artefact is made once, not by a worker
    command = str(Path(sys.executable).with_name("labelfleet"))
    commands: dict[str, Callable[[], float]] = {
        "labelfleet --help": lambda: seconds([command, "--help"]),
        "python -c pass": lambda: seconds([sys.executable, "-c", "pass"]),
    }
    for name in names:
        commands[f"{name} worker's first image"] = worker_command(name, options)
    rounds = Rounds()
    rounds.run(commands, options.rounds)
    for name in commands:
        report.add(f"{name}, s", rounds.per_round(lambda row, n=name: row[n]))  # type: ignore[misc]
    shards = Rounds()
    with scratch() as folder:
        worker = Worker(FreeDetector(), options_for(options.device, CORES), Path(folder))
        sides = shard_sides(worker, photos, Path(folder))
        worker.label(Path(folder) / str(PER_SHARD[-1]))
        shards.run(sides, options.rounds)
        worker.close()
    whole = f"{len(photos)} images a shard"
    for count in PER_SHARD:
        cost = shards.per_round(lambda row, c=count: c * (1 / row[f"{c} a shard"] - 1 / row[whole]))  # type: ignore[misc]
        scaled = Ratio(cost.median * 1e3, cost.low * 1e3, cost.high * 1e3)
        report.add(f"ms a shard of {count}, whatever is in it", scaled)
    report.values = {**rounds.values, **shards.values}
    report.write(options.out)


def shard_sides(
    worker: Worker, photos: list[bytes], folder: Path
) -> dict[str, Callable[[], float]]:
    """Return the same images in shards of every size."""
    sides: dict[str, Callable[[], float]] = {}
    for count in (*PER_SHARD, len(photos)):
        name = f"{count} a shard" if count < len(photos) else f"{count} images a shard"
        source = folder / str(count)
        write_tars(source, photos, count)
        sides[name] = lambda s=source: images_per_s(len(photos), lambda: worker.label(s))  # type: ignore[misc]
    return sides


def seconds(command: list[str]) -> float:
    """Wall seconds of a command that succeeds."""
    began_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began_s


def worker_command(variant: str, options) -> Callable[[], float]:  # type: ignore[no-untyped-def]  # argparse's
    """From `python` to the end of a process that labels one image."""
    command = [sys.executable, "-m", "benchmarks.startup", "--one", variant, "--images", "1",
               "--out", str(options.out), "--device", options.device]  # fmt: skip
    return lambda: seconds(command)


def first_image(variant: str, photos: list[bytes], options) -> None:  # type: ignore[no-untyped-def]  # argparse's
    """Be that process."""
    found = detector(variant, checkpoint(options.out, photos), options.device)
    with scratch() as folder:
        write_tars(Path(folder) / "in", photos, 1)
        worker = Worker(found, options_for(options.device, CORES), Path(folder))
        worker.label(Path(folder) / "in")
        worker.close()


if __name__ == "__main__":
    main()

"""A worker's peak memory against that of a process that holds the bare model and runs one batch.

    python -m benchmarks.memory [--photos FOLDER] [--variants openvino-fp32,free]

Each in processes of their own, peak resident memory as the kernel counts it. The bare model runs
batches of the size that the worker has found; what the worker has on top is queues, decoders,
rows and Parquet. For `free` the bare process holds the same packages and no model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.detectors import FreeDetector
from benchmarks.efficiency import bare_model, options_for
from benchmarks.models import checkpoint, detector, variants
from benchmarks.photos import photo_bytes, scratch, write_tars
from benchmarks.rounds import Report, Rounds, chosen, parser, plain
from benchmarks.worker import CORES, Worker

AT_MOST_MB = 600


def main() -> None:
    made = parser(__doc__, images=96, rounds=1)
    made.add_argument("--variants", help="comma-separated; default: all that are here, and free")
    made.add_argument("--one", choices=("bare", "worker"), help="one process, for the others")
    made.add_argument("--batch", type=int, default=8)
    options = made.parse_args()
    photos = photo_bytes(options.photos, options.images)
    if options.one:
        peak, batch = one(options.one, options.variants, photos, options)
        sys.stdout.write(json.dumps([peak, batch]) + "\n")
        return
    report = Report("memory", "MB", plain(options))
    for variant in chosen([*variants(options.device), "free"], options.variants):
        if variant != "free":
            options.out.mkdir(parents=True, exist_ok=True)
            checkpoint(options.out, photos)
        compare(variant, options, report)
    report.write(options.out)


def compare(variant: str, options, report: Report) -> None:  # type: ignore[no-untyped-def]  # argparse's
    """Both processes in turn; the worker first, since the bare one runs its batch size."""
    batch = 8

    def worker() -> float:
        nonlocal batch
        peak, batch = spawn("worker", variant, options, batch)
        return peak

    rounds = Rounds()
    names = (f"{variant} worker", f"{variant} bare model")
    rounds.run(
        {names[0]: worker, names[1]: lambda: spawn("bare", variant, options, batch)[0]},
        options.rounds,
    )
    report.values |= rounds.values
    report.facts[variant] = {"batch": batch, "at_most_mb": AT_MOST_MB}
    more = rounds.per_round(lambda row: row[names[0]] - row[names[1]])
    report.add(f"{variant}: MB above the bare model (at most {AT_MOST_MB})", more)


def spawn(what: str, variant: str, options, batch: int) -> tuple[float, int]:  # type: ignore[no-untyped-def]  # argparse's
    """Peak MB of one process, and its batch size."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", what, "--variants", variant,
               "--images", str(options.images), "--device", options.device,
               "--out", str(options.out), "--batch", str(batch)]  # fmt: skip
    if options.photos:
        command += ["--photos", str(options.photos)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, found = json.loads(done.stdout.splitlines()[-1])
    return peak, found


def one(what: str, variant: str, photos: list[bytes], options) -> tuple[float, int]:  # type: ignore[no-untyped-def]  # argparse's
    """Be that process."""
    found = (
        FreeDetector()
        if variant == "free"
        else detector(variant, checkpoint(options.out, photos), options.device)
    )
    batch = options.batch
    if what == "bare":
        bare_model(found, photos, batch)()
    else:
        with scratch() as name:
            write_tars(Path(name) / "in", photos, max(1, len(photos) // 4))
            worker = Worker(found, options_for(options.device, CORES), Path(name))
            for _ in range(2):
                worker.label(Path(name) / "in")
            batch = worker.batch_size
            worker.close()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, batch


if __name__ == "__main__":
    main()

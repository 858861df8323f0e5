"""What the pipeline costs on top of the model: images/s ÷ what this machine could do at best.

    python -m benchmarks.efficiency [--photos FOLDER] [--variants torch-fp32,openvino-fp32,free]

The bound of a CPU, whose cores decoder and model share, is 1 / (seconds an image of the bare
model, forward and NMS, on preloaded batches, + seconds an image of bare decode and letterbox),
each measured alone on all cores in the same round. The bound of a GPU is the bare model alone,
batches from page-locked memory queued one behind the other; the ratio is how busy the GPU is kept.
``free`` is a detector that costs nothing, against the bare decode loop on all cores.

The pipeline reads tar shards from disk and commits Parquet; it also takes digests and perceptual
hashes, which the bound does not. Its batch size is its own choice; the bare model gets the same.
On a CPU the ratio is told in CPU time as well, which other work on the machine hardly changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.detectors import FreeDetector
from benchmarks.models import checkpoint, detector, variants
from benchmarks.photos import photo_bytes, scratch, write_tars
from benchmarks.rounds import Report, Rounds, chosen, images_per_s, parser, plain
from benchmarks.worker import CORES, Worker, decode_all
from pipelines.cluster.sizing import Node, size_pool
from pipelines.config.run_config import WorkersConfig
from workers.detectors.protocol import Detector, QueueingDetector
from workers.spec import LabellerOptions

FREE_IMAGES = 20  # as many times --images: it is so much faster


def options_for(device: str, cores: int) -> LabellerOptions:
    """As the product would have them for one worker that has this machine to itself."""
    cuda = device == "cuda"
    sizing = size_pool(WorkersConfig(count=1), [Node(cores, 1.0 if cuda else 0.0)], cuda=cuda)
    return LabellerOptions(
        decode_threads=sizing.decode_threads,
        nms_threads=sizing.nms_threads,
        batch_size=sizing.batch_size,
        batch_size_max=sizing.batch_size_max,
    )


def bare_model(found: Detector, photos: list[bytes], batch: int) -> Callable[[], object]:
    """Forward and NMS over as many images as there are photos, on preloaded batches; forward
    alone where the device queues."""
    decoded = decode_all(photos[:32], found.preprocessing)
    pixels = np.resize(decoded, (batch, *decoded.shape[1:]))  # a batch may be larger than that
    batches = max(1, len(photos) // len(pixels))
    if isinstance(found, QueueingDetector):
        preloaded = found.empty(len(pixels))
        preloaded[:] = pixels
        return lambda: _back_to_back(found, preloaded, batches)
    return lambda: [found.detect(pixels) for _ in range(batches)]


def _back_to_back(found: QueueingDetector, batch: NDArray[np.uint8], times: int) -> None:
    running = found.launch(batch)
    for _ in range(times - 1):
        following = found.launch(batch)
        running()
        running = following
    running()


def main() -> None:
    made = parser(__doc__, images=96, rounds=3)
    made.add_argument("--variants", help="comma-separated; default: all that are here, and free")
    options = made.parse_args()
    every = [*variants(options.device), "free"]
    photos = photo_bytes(options.photos, options.images)
    report = Report("efficiency", "images/s", plain(options))
    options.out.mkdir(parents=True, exist_ok=True)
    for variant in chosen(every, options.variants):
        with scratch() as folder:
            measure(variant, photos, options, Path(folder), report)
    report.write(options.out)


def measure(variant: str, photos: list[bytes], options, folder: Path, report: Report) -> None:  # type: ignore[no-untyped-def]  # argparse's
    """One variant: its rounds, and its line."""
    free = variant == "free"
    photos = photos * FREE_IMAGES if free else photos
    found: Detector = (
        FreeDetector()
        if free
        else detector(variant, checkpoint(options.out, photos), options.device)
    )
    write_tars(folder / "in", photos, max(1, len(photos) // 4))
    worker = Worker(found, options_for(options.device, CORES), folder)
    worker.warm_up(folder / "in")
    count = len(photos)
    model = bare_model(found, photos, worker.batch_size)
    sides: dict[str, Callable[[], float]] = {
        f"{variant} pipeline": lambda: images_per_s(count, lambda: worker.label(folder / "in")),
        f"{variant} decode": lambda: images_per_s(
            count, lambda: decode_all(photos, found.preprocessing)
        ),
    }
    whole = count
    if not free:
        whole = count // worker.batch_size * worker.batch_size or worker.batch_size
        sides[f"{variant} model"] = lambda: images_per_s(whole, model)
    rounds = Rounds()
    rounds.run(sides, options.rounds)
    worker.close()
    report.values |= rounds.values
    report.facts[variant] = {"batch": worker.batch_size}

    def in_cpu_time(row: Mapping[str, float]) -> float:
        seconds = row[f"{variant} decode"] / count
        if not free:
            seconds += row[f"{variant} model"] / whole
        return seconds / (row[f"{variant} pipeline"] / count)

    def against_bound(row: Mapping[str, float]) -> float:
        seconds = 0.0 if free else 1 / row[f"{variant} model"]
        if free or options.device == "cpu":
            seconds += 1 / row[f"{variant} decode"]
        return row[f"{variant} pipeline"] * seconds

    name = "free detector ÷ bare decode loop" if free else f"{variant} ÷ machine's bound"
    report.add(name, rounds.per_round(against_bound), at_least=0.8 if free else 0.95)
    if options.device == "cpu":
        report.add(f"{name}, in CPU time", rounds.per_round(in_cpu_time, cpu=True))


if __name__ == "__main__":
    main()

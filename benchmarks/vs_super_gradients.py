"""Images/s end to end against super-gradients' predict(): same files, weights and thresholds.

    python -m benchmarks.vs_super_gradients [--photos FOLDER] [--variants openvino-fp32]

Both get paths of JPEG files. predict() returns objects; ours commits Parquet rows with digests,
top-5 classes and DFL statistics. predict() runs at each of --batches in the first round, from
then on at its best and at its default, 32 (which needs --images 32 or more). Both keep boxes from
0.25 on, as predict() does. Everything else of predict() is its default; on a GPU that is fp16.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.efficiency import options_for
from benchmarks.models import checkpoint, detector, spec_of, variants
from benchmarks.photos import photo_bytes, scratch, write_files
from benchmarks.rounds import Report, Rounds, chosen, images_per_s, parser, plain, say
from benchmarks.worker import CORES, Worker
from storage.objects.protocols import StorageOptions
from workers.checkpoints.cache import fetch_checkpoint
from workers.checkpoints.file import read_checkpoint

CONF, IOU = 0.25, 0.7
DEFAULT_BATCH = 32
# By precision: against predict() at its best batch and at its default one, on a CPU.
WANTED = {"fp32": (1.9, 3.0), "int8": (6.5, 10.0), "fp16": (10.0, 10.0)}


def predictor(path: Path, device: str) -> Any:
    """Return the network as super-gradients users have it, on its COCO pipeline."""
    from workers.yolo_nas.network import build_network, import_super_gradients, load_weights

    import_super_gradients()
    import torch
    from super_gradients.training.processing.processing import (
        default_yolo_nas_coco_processing_params,
    )

    torch.set_num_threads(CORES)
    spec = spec_of("torch-fp32", path, "cpu")
    network: Any = build_network(spec.name, spec.arch_params, len(spec.classes))
    found = fetch_checkpoint(spec.checkpoint, StorageOptions(), sha256=spec.sha256)
    load_weights(network, read_checkpoint(found))
    params = default_yolo_nas_coco_processing_params()
    network.set_dataset_processing_params(**{**params, "conf": CONF, "iou": IOU})
    return network.eval().to(device)


def predicting(network: Any, files: list[Path], batch: int) -> Callable[[], int]:
    """predict() over all files, and how many boxes it found."""
    paths = [str(path) for path in files]

    def run() -> int:
        with contextlib.redirect_stderr(io.StringIO()):
            found = network.predict(paths, batch_size=batch)
            return sum(len(one.prediction.confidence) for one in found)

    return run


def main() -> None:
    made = parser(__doc__, images=64, rounds=3)
    made.add_argument("--variants", help="comma-separated; default: all that are here")
    made.add_argument("--batches", default="1,2,4,8,16,32", help="predict()'s, in the first round")
    options = made.parse_args()
    photos = photo_bytes(options.photos, options.images)
    options.out.mkdir(parents=True, exist_ok=True)
    path = checkpoint(options.out, photos)
    report = Report("vs_super_gradients", "images/s", plain(options))
    with scratch() as name:
        folder = Path(name)
        files = write_files(folder / "in", photos)
        network = predictor(path, options.device)
        workers = {
            variant: Worker(
                detector(variant, path, options.device, floor=CONF),
                options_for(options.device, CORES),
                folder / variant,
            )
            for variant in chosen(variants(options.device), options.variants)
        }
        batches = [int(text) for text in options.batches.split(",")]
        measure(report, network, workers, files, batches, options)
        for worker in workers.values():
            worker.close()
    report.write(options.out)


def measure(  # type: ignore[no-untyped-def]  # argparse's
    report: Report,
    network: Any,
    workers: dict[str, Worker],
    files: list[Path],
    batches: list[int],
    options,
) -> None:
    """All sides, and a line for each of ours."""
    count = len(files)
    batches = [batch for batch in batches if batch <= count]  # a larger one would never be full

    def predict_at(batch: int) -> Callable[[], float]:
        run = predicting(network, files, batch)
        return lambda: images_per_s(count, run)

    first = Rounds()
    first.run({f"predict() at {batch}": predict_at(batch) for batch in batches}, 1)
    best = max(batches, key=lambda batch: first.median(f"predict() at {batch}"))
    say(f"predict() is fastest at a batch of {best}")
    compared = [best, *([DEFAULT_BATCH] if best != DEFAULT_BATCH <= count else [])]
    sides = {f"predict() at {batch}": predict_at(batch) for batch in compared}
    for variant, worker in workers.items():
        worker.warm_up(files[0].parent)
        sides[variant] = labelling(worker, files[0].parent, count)
    rounds = Rounds()
    rounds.run(sides, options.rounds)
    report.values = {**first.values, **rounds.values}
    report.facts = {
        "predict_best_batch": best,
        "batch": {variant: worker.batch_size for variant, worker in workers.items()},
    }
    for variant in workers:
        wanted = WANTED.get(variant.rpartition("-")[2], (None, None))
        for batch, at_least in zip(compared, wanted, strict=False):
            name = f"predict() at {batch}"
            ratio = rounds.per_round(lambda row, v=variant, n=name: row[v] / row[n])  # type: ignore[misc]
            best_or = "its best batch" if batch == best else "its default batch"
            label = f"{variant} ÷ predict() at {best_or}, {batch}"
            report.add(label, ratio, at_least=at_least)
            if options.device == "cpu":
                cpu = rounds.per_round(lambda row, v=variant, n=name: row[n] / row[v], cpu=True)  # type: ignore[misc]
                report.add(f"{label}, in CPU time", cpu)


def labelling(worker: Worker, source: Path, count: int) -> Callable[[], float]:
    """Return images/s of one run of the worker."""
    return lambda: images_per_s(count, lambda: worker.label(source))


if __name__ == "__main__":
    main()

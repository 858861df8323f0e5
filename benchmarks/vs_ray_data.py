"""Images/s against the same job in Ray Data, written as its documentation writes batch inference.

    python -m benchmarks.vs_ray_data [--photos FOLDER] [--models openvino-fp32,free]

Ray Data: read_images → map (letterbox) → map_batches (a stateful class with the same detector) →
write_parquet. Ours: the product's driver, dispatcher, pool and one actor. Both on one local Ray
with this machine's cores, over the same loose JPEG files, with the same detector on all cores.
Each is timed from when its model is loaded; by then Ray Data has read and letterboxed what its
object store holds, ours has not begun. So the store is small beside the images: with one that
holds all of them Ray Data's decoding would be over when the clock starts.
Ray Data writes boxes, scores and classes; ours also digests, top-5 classes and DFL statistics.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.actors import actor_around
from benchmarks.detectors import FreeDetector
from benchmarks.efficiency import options_for
from benchmarks.models import checkpoint, detector, variants
from benchmarks.photos import photo_bytes, scratch, write_files
from benchmarks.rounds import Report, Rounds, chosen, parser, plain
from benchmarks.scaling import spec_of, start_ray, through_pool
from benchmarks.worker import CORES, identity_of
from storage.runs.manifest import Manifest, RunRecord
from storage.shards.selecting import group_images
from storage.stores.open import open_store
from workers.actors.pool import PoolSize
from workers.detectors.protocol import Detector
from workers.images.letterbox import letterbox
from workers.images.preprocessing import Preprocessing

PER_SHARD = 64
BATCH = 8
# The letterbox is a stage of its own beside the model's actor, as it is where that asks for a GPU.
# On a CPU Ray Data would fuse both into the actor, unless they ask for different resources.
APART = 0.9
FREE_IMAGES = 10  # as many times --images


def main() -> None:
    made = parser(__doc__, images=96, rounds=3)
    made.add_argument("--models", help="comma-separated; default: all that are here, and free")
    made.add_argument("--object-store-mb", type=int, default=512, help="of Ray; default 512")
    options = made.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    photos = photo_bytes(options.photos, options.images)
    report = Report("vs_ray_data", "images/s", plain(options))
    start_ray(cpus=CORES, object_store_mb=options.object_store_mb)
    for name in chosen([*variants(options.device), "free"], options.models):
        with scratch() as folder:
            several = photos * (FREE_IMAGES if name == "free" else 1)
            files = write_files(Path(folder) / "in", several)
            sides = both(name, files, maker(name, photos, options), options, Path(folder))
            rounds = Rounds()
            rounds.run(sides, options.rounds)
        report.values |= rounds.values
        ratio = rounds.per_round(lambda row, n=name: row[n] / row[f"Ray Data, {n}"])  # type: ignore[misc]
        report.add(f"{name} ÷ Ray Data", ratio, at_least=2.0 if name == "free" else 1.1)
    report.write(options.out)


def maker(name: str, photos: list[bytes], options: Any) -> Callable[[], Detector]:
    """Makes the detector, wherever it is called."""
    if name == "free":
        return FreeDetector
    path, device = checkpoint(options.out, photos).absolute(), options.device
    detector(name, path, device)  # its artefact is made once, not by every actor
    return lambda: detector(name, path, device)


def both(
    name: str, files: list[Path], make: Callable[[], Detector], options: Any, folder: Path
) -> dict[str, Callable[[], float]]:
    """Both ways to label the files."""
    return {
        name: lambda: ours(files, make, options.device, folder),
        f"Ray Data, {name}": lambda: ray_data(files, make, folder),
    }


def ours(files: list[Path], make: Callable[[], Detector], device: str, folder: Path) -> float:
    """Return the product: driver, pool, one actor."""
    output = folder / f"out-{secrets.token_hex(4)}"
    identity = identity_of(tuple(f"class-{i}" for i in range(80)))
    record = RunRecord(identity, {}, {}, "2026-01-01T00:00:00+00:00")
    manifest = Manifest.create_or_continue(open_store(str(output)), record)
    shards = list(group_images(open_store(str(files[0].parent)).list(), PER_SHARD))
    spec = spec_of(str(files[0].parent), str(output), options_for(device, CORES), threads=CORES)
    gpus = 1.0 if device == "cuda" else 0.0
    return through_pool(manifest, spec, PoolSize(1, gpus, CORES), actor_around(make), shards)


class Predictor:
    """The stateful class of Ray Data's guide to batch inference."""

    def __init__(self, make: Callable[[], Detector], ready: str) -> None:
        self._detector = make()
        Path(ready).write_text(str(time.time()))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the boxes to a batch, and drops its pixels."""
        found = self._detector.detect(np.ascontiguousarray(np.stack(list(batch["image"]))))
        scale, shift = batch["scale"], batch["shift"]
        boxes = [(f.boxes - s) / k for f, s, k in zip(found, shift, scale, strict=True)]
        return {
            "path": batch["path"],
            "boxes": [b.reshape(-1).tolist() for b in boxes],
            "scores": [f.scores.tolist() for f in found],
            "classes": [f.category_ids.tolist() for f in found],
        }


def letterboxed(row: dict[str, Any]) -> dict[str, Any]:
    """One image to the network's input, and the way back."""
    pixels, transform = letterbox(row["image"], Preprocessing())
    shift = np.array([transform.pad_left, transform.pad_top] * 2, np.float32)
    return {"image": pixels, "path": row["path"], "scale": transform.scale_x, "shift": shift}


def ray_data(files: list[Path], make: Callable[[], Detector], folder: Path) -> float:
    """Return the same in Ray Data."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    ready = folder / f"ready-{secrets.token_hex(4)}"
    (
        ray.data.read_images(str(files[0].parent), mode="RGB", include_paths=True)
        .map(letterboxed)
        .map_batches(
            Predictor,
            fn_constructor_args=(make, str(ready)),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=APART,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(CORES)}},
        )
        .write_parquet(str(folder / f"ray-{secrets.token_hex(4)}"))
    )
    return len(files) / (time.time() - float(ready.read_text()))


if __name__ == "__main__":
    main()

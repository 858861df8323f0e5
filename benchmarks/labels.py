"""What follows a run, on many boxes: fit, decide, route, export and browse, in time and memory.

    python -m benchmarks.labels [--boxes 10000000] [--each 15] [--keep FOLDER]

Writes a synthetic run (rows, no images) shard by shard, and ground truth for 4,000 of its images.
Each step is a process of its own, whose peak memory is the step's. Beside it stands DuckDB's scan,
of the columns that the step reads: of the run's rows, or, for ``export``, of the label version's.
A step may take ten times its CPU time, and 1 GB. (YOLO's one file an image is left out: what it
takes is the file system's.)
"""

from __future__ import annotations

import hashlib
import json
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import Ratio, Report, parser, plain, say
from pipelines.face.run import Run
from storage.labels.versions import read_version
from storage.records import AnnotationRow, Detections, Shard
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.synthetic_run import (
    commit_rows,
    image_shard,
    list_shards,
    random_boxes,
    record,
    row,
)

PER_SHARD = 2_000
TRUE_SHARDS = 2
SIZE = (640, 480)
STEPS = ("fit", "decide", "route", "export coco", "export hf", "browse")
_SLOWEST, _MOST_MB = 10.0, 1_000.0


def main() -> None:
    """Make the run where it is missing, and take the steps."""
    made = parser(__doc__, images=0, rounds=1)
    made.add_argument("--boxes", type=int, default=10_000_000, help="of the run, about")
    made.add_argument("--each", type=int, default=15, help="boxes an image, on average")
    made.add_argument("--steps", default=",".join(STEPS), help="comma-separated; default: all")
    made.add_argument("--keep", type=Path, help="folder of the run; used again where it is there")
    made.add_argument("--one", help="be one step's process")
    options = made.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(one(options.one, options.keep)) + "\n")
        return
    with tempfile.TemporaryDirectory(prefix="labelfleet-bench-") as scratch:
        folder = options.keep or Path(scratch)
        if not (folder / "truth.json").exists():
            began_s = time.perf_counter()
            synthetic(folder, options.boxes // options.each, options.each)
            say(f"the run: {time.perf_counter() - began_s:.0f} s")
        report = Report("labels", "s", plain(options))
        for step in options.steps.split(","):
            measure(step, folder, options.rounds, report)
        report.write(options.out)


def measure(step: str, folder: Path, rounds: int, report: Report) -> None:
    """Take one step, in processes of its own, and DuckDB's scan beside it."""
    command = [sys.executable, "-m", "benchmarks.labels", "--keep", str(folder), "--one"]
    ratios, peaks = [], []
    for _ in range(rounds):
        took = {}
        for name in (f"scan for {step}", step):
            done = subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True)
            took[name] = json.loads(done.stdout.splitlines()[-1])
            report.values.setdefault(name, []).append(took[name]["s"])
            report.values.setdefault(f"{name}, CPU", []).append(took[name]["cpu_s"])
        for made in (*folder.glob("export-*"), *folder.glob("browse-*")):
            shutil.rmtree(made)
        ratios.append(took[step]["cpu_s"] / took[f"scan for {step}"]["cpu_s"])
        peaks.append(took[step]["peak_mb"])
    report.facts[step] = {
        "peak memory, MB": round(max(peaks)),
        "within 1 GB": max(peaks) <= _MOST_MB,
        "within ten scans": sorted(ratios)[len(ratios) // 2] <= _SLOWEST,
    }
    ratios.sort()
    report.add(
        f"{step} ÷ scan, in CPU time", Ratio(ratios[len(ratios) // 2], ratios[0], ratios[-1])
    )
    seconds, cpu = report.values[step], report.values[f"{step}, CPU"]
    say(f"  {step}: {max(seconds):.1f} s, {max(cpu):.1f} s of CPU, peak {max(peaks):.0f} MB")


def one(name: str, folder: Path) -> dict[str, float]:
    """Take a step or a scan in this process."""
    step = scan_of(name, folder) if name.startswith("scan for ") else step_of(name, folder)
    began_s, spent_s = time.perf_counter(), time.process_time()
    step()
    return {
        "s": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - spent_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def step_of(name: str, folder: Path) -> Callable[[], object]:
    """Return what a step does; what it imports is imported before its clock runs."""
    run = Run(str(folder / "run"))
    if name == "fit":
        from pipelines.face.steps import fit

        return lambda: fit(run, str(folder / "truth.json"))
    if name == "decide":
        from pipelines.face.steps import decide

        return lambda: decide(run)
    if name == "route":
        from pipelines.policy.policy import Policy
        from pipelines.routing.route import route_run

        invocation = f"i{secrets.token_hex(4)}"
        return lambda: route_run(
            run.manifest, budget="500 images", policy=Policy(), invocation=invocation
        )
    if name.startswith("export "):
        from pipelines.face.steps import export

        out = folder / f"export-{secrets.token_hex(4)}"
        return lambda: export(run, str(out), name.split()[1])  # type: ignore[arg-type]
    from pipelines.browse.index import build_index, find_sources

    place = folder / f"browse-{secrets.token_hex(4)}"
    place.mkdir()
    return lambda: build_index(find_sources(run.manifest, None, None), place)


_SCANS = {
    "annotations": (
        "annotations/*.parquet",
        "SELECT count(*), sum(b.score), sum(b.category_id), sum(b.bbox[1] + b.bbox[2] + b.bbox[3] "
        "+ b.bbox[4]), sum(b.topk_scores[1]), max(b.topk_ids[1]), max(sha256), max(image_id), "
        "sum(width + height) FROM (SELECT *, unnest(detections) AS b FROM read_parquet('{}'))",
    ),
    "labels": (
        "labels/{}/*.parquet",
        "SELECT count(*), sum(b.score), sum(b.category_id), sum(b.bbox[1] + b.bbox[2] + b.bbox[3] "
        "+ b.bbox[4]), max(sha256), max(image_id), sum(width + height) "
        "FROM (SELECT *, unnest(labels) AS b FROM read_parquet('{}'))",
    ),
}


def scan_of(name: str, folder: Path) -> Callable[[], list[tuple[Any, ...]]]:
    """Return DuckDB's scan of the columns that a step reads."""
    import duckdb

    files, query = _SCANS["labels" if "export" in name else "annotations"]
    if "export" in name:
        files = files.format(read_version(open_store(str(folder / "run"))).version)
    statement = query.format(folder / "run" / files)
    return lambda: duckdb.execute(statement).fetchall()


def synthetic(folder: Path, images: int, each: int) -> None:
    """Write a run of that many images, one shard in memory at a time, and its ground truth."""
    chance = np.random.default_rng(0)
    store = open_store(str(folder / "run"))
    manifest = Manifest.create_or_continue(store, record(source=str(folder / "source")))
    shards = [
        image_shard(*(f"{at // 10_000:03}/{at:07}.jpg" for at in range(first, first + PER_SHARD)))
        for first in range(0, images, PER_SHARD)
    ]
    list_shards(store, shards)
    truth = Truth(
        folder / "truth.json", [c.official_id for c in manifest.record.identity.categories]
    )
    for number, shard in enumerate(shards):
        rows = list(_rows(chance, shard, each))
        commit_rows(manifest, shard, rows)
        if number < TRUE_SHARDS:
            truth.add(chance, rows)
    truth.write()


def _rows(chance: np.random.Generator, shard: Shard, each: int) -> Iterator[AnnotationRow]:
    counts = chance.poisson(each, len(shard.objects))
    drawn = random_boxes(chance, int(counts.sum()), *SIZE)
    # They come by score, highest first; each image takes some of all scores, in that order.
    dealt = chance.permutation(len(drawn))
    image = np.repeat(np.arange(len(counts)), counts)
    drawn = _taken(drawn, dealt[np.lexsort((dealt, image))])
    ends = np.cumsum(counts).tolist()
    for listed, first, end in zip(shard.objects, [0, *ends], ends, strict=False):
        digest = hashlib.sha256(listed.key.encode()).hexdigest()
        made = row(listed.key, shard.shard_id, _taken(drawn, slice(first, end)))
        yield AnnotationRow(
            made.image_id, made.shard_id, made.offset, made.nbytes, digest, int(digest[:16], 16),
            made.width, made.height, 1, "ok", None, made.detections, 1,
        )  # fmt: skip


def _taken(drawn: Detections, places: Any) -> Detections:
    arrays = {name: getattr(drawn, name) for name in Detections.__slots__}
    taken: dict[str, Any] = {n: None if a is None else a[places] for n, a in arrays.items()}
    return Detections(**taken)


class Truth:
    """COCO ground truth in which a box is right the likelier the higher its score is."""

    def __init__(self, path: Path, official_ids: list[int]) -> None:
        self._path, self._ids = path, official_ids
        self._images: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []

    def add(self, chance: np.random.Generator, rows: list[AnnotationRow]) -> None:
        """Add images, with those of their boxes that are right."""
        for one_row in rows:
            number = len(self._images) + 1
            self._images.append({"id": number, "file_name": one_row.image_id,
                                 "width": SIZE[0], "height": SIZE[1]})  # fmt: skip
            found = one_row.detections
            right = chance.uniform(size=len(found)) < found.scores
            for (x1, y1, x2, y2), kind in zip(
                found.boxes[right].tolist(), found.category_ids[right].tolist(), strict=True
            ):
                box = [x1, y1, max(1.0, x2 - x1), max(1.0, y2 - y1)]
                self._boxes.append({"id": len(self._boxes) + 1, "image_id": number,
                                    "category_id": self._ids[kind], "bbox": box,
                                    "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip

    def write(self) -> None:
        """Write the file, at last: it says that the run is complete."""
        names = record().identity.categories
        categories = [{"id": c.official_id, "name": c.name} for c in names]
        found = {"images": self._images, "annotations": self._boxes, "categories": categories}
        self._path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""Every runtime × precision × batch: speed on a YOLO-NAS S at 640², mAP on the compact model.

    python -m benchmarks.runtimes SHARED [--batches 1,4,8] [--rounds 5] [--out runs/benchmarks]

SHARED holds data/coco_ccby, data/bccd and models/bccd_nano.safetensors. Timed is ``detect``:
network, decoding and NMS, on batches that lie in memory; all variants in turn, round by round, and
ratios are taken within a round, so that a busy machine favours none. The S has random weights that
find about 15 boxes an image (timed_model.py). mAP is that of bccd's test split; INT8 is calibrated
on images of its train split and decided on val. What is made is kept below --out for the next time.
Needs no Ray; on a CUDA machine the variants are those of its GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timed_model import letterboxed, write_timed_checkpoint
from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.models.artefact import find_artefact, with_artefact
from pipelines.models.int8 import Against
from pipelines.models.measure import detect_all, expected_from_truth, mean_ap
from pipelines.models.requested import model_request
from pipelines.models.sample_images import measured
from storage.coco.truth import read_truth
from storage.errors import LabelfleetError
from storage.objects.protocols import StorageOptions
from workers.detectors.protocol import Detector
from workers.models.load import load_detector
from workers.models.resolve import resolve_model
from workers.runtimes.artefacts import fetch_artefact
from workers.runtimes.choose import PRECISIONS, installed
from workers.spec import DeviceName

Variant = tuple[str, str]
CORES = len(os.sched_getaffinity(0))
_REFERENCE: Variant = ("torch", "fp32")


def variants(device: DeviceName) -> list[Variant]:
    """Return what can run here. Precisions that this CPU only emulates are left out."""
    here, native = installed(), _native()
    return [
        (runtime, precision)
        for (runtime, on), precisions in PRECISIONS.items()
        for precision in precisions
        if on == device and runtime in here
        if device == "cuda" or precision in ("fp32", "int8") or precision in native
    ]


def _native() -> set[str]:
    flags = _cpu_flags()
    return {name for name, flag in (("bf16", "avx512_bf16"), ("fp16", "avx512_fp16"))
            if flag in flags}  # fmt: skip


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    return set(text.partition("flags")[2].partition("\n")[0].split())


def machine(device: DeviceName) -> str:
    """Return the machine in words."""
    if device == "cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, {CORES} CPU cores"
    flags = _cpu_flags()
    known = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags]
    vnni = "VNNI" if {"avx512_vnni", "avx_vnni"} & flags else "no VNNI"
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    return f"{CORES} CPU cores ({model[1] if model else '?'}, {known[0]}, {vnni}), no GPU"


def detector_of(config: RunConfig, device: DeviceName, truth: str | None = None) -> Detector:
    """Compiled the way a run does it, and loaded on all cores."""
    spec = resolve_model(model_request(config), StorageOptions(), device=device)
    judged = read_truth(truth) if truth and spec.precision == "int8" else None
    return load_detector(
        with_artefact(config, spec, against=Against(judged)), StorageOptions(), threads=CORES
    )


def timed_config(variant: Variant, shared: Path, out: Path) -> RunConfig:
    """Return the S; any loss is accepted, since random weights say nothing of it."""
    photos = sorted((shared / "data/coco_ccby/images").rglob("*.jpg"))
    checkpoint = write_timed_checkpoint(out / "timed_s.safetensors", photos)
    model = {"checkpoint": str(checkpoint), "max_loss": 100}
    return _config(variant, shared / "data/coco_ccby/images", out, model)


def compact_config(variant: Variant, shared: Path, out: Path) -> RunConfig:
    """Return the compact model on bccd; its source is the train split."""
    train = read_truth(shared / "data/bccd/train.json")
    keys = out / "bccd_train.csv"
    keys.write_text("key\n" + "".join(f"{image.name}\n" for image in train.images))
    model = {
        "checkpoint": str(shared / "models/bccd_nano.safetensors"),
        "arch": str(shared / "models/bccd_nano_arch.yaml"),
        "classes": ["RBC", "WBC", "Platelets"],
        "image_size": 320,
        "score_floor": 0.01,
    }
    return _config(variant, shared / "data/bccd/images", out, model, keys=str(keys))


def _config(
    variant: Variant, source: Path, out: Path, model: dict[str, Any], **more: Any
) -> RunConfig:
    chosen = {"runtime": variant[0], "precision": variant[1], "artefacts": str(out / "artefacts")}
    fields = {
        "name": "runtimes",
        "source": {"url": str(source), **more},
        "output": str(out / "run"),
        "model": {**model, **chosen},
    }
    return parse_config(RunConfig, fields, where="runtimes")


def speeds(
    detectors: dict[Variant, Detector],
    images: NDArray[np.uint8],
    batches: Sequence[int],
    rounds: int,
    clock: Callable[[], float],
) -> dict[int, dict[Variant, list[float]]]:
    """Return images a second by batch size and variant, one value a round."""
    found: dict[int, dict[Variant, list[float]]] = {b: {v: [] for v in detectors} for b in batches}
    for number in range(rounds + 1):  # the first one warms up
        for batch in batches:
            parts = [images[i : i + batch] for i in range(0, max(batch, 4), batch)]
            order = list(detectors) if number % 2 else list(detectors)[::-1]
            for variant in order:
                began_s = clock()
                for part in parts:
                    detectors[variant].detect(part)
                took_s = clock() - began_s
                if number:
                    found[batch][variant].append(sum(map(len, parts)) / took_s)
    return found


def accuracy(shared: Path, out: Path, variant: Variant, device: DeviceName) -> float | None:
    """mAP on bccd's test split in points; None where INT8 loses more than it may."""
    config = compact_config(variant, shared, out)
    try:
        detector = detector_of(config, device, str(shared / "data/bccd/val.json"))
    except LabelfleetError as exc:
        _say(f"{' '.join(variant)}: {exc.message}")
        return None
    truth = read_truth(shared / "data/bccd/test.json")
    inputs, indices = measured(config, detector.preprocessing, truth)
    return mean_ap(detect_all(detector, inputs),
                   expected_from_truth(truth, indices, detector.classes))  # fmt: skip


def int8_facts(
    shared: Path, out: Path, variant: Variant, device: DeviceName
) -> dict[str, Any] | None:
    """Return how the compact model's INT8 was made: what was tried, kept, and lost on val."""
    config = compact_config(variant, shared, out)
    spec = resolve_model(model_request(config), StorageOptions(), device=device)
    ref = find_artefact(config, spec)
    if ref is None:
        return None
    facts = fetch_artefact(ref, StorageOptions()).facts
    for trial in facts["trials"]:
        _say(
            f"  {trial['loss']:+.2f} points lost on val with {', '.join(trial['kept'])} in float32"
        )
    alone = "loss_with_block_in_float32"
    for name, lost in sorted(facts[alone].items(), key=lambda item: item[1]):
        _say(f"  {name:24s} in float32 beside the recipe: {lost:+.2f} points lost on val")
    return {k: facts[k] for k in ("calibration", "measured", "kept", "trials", alone)}


def main() -> None:
    """Measure, print a table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--no-map", action="store_true", help="speed only")
    parser.add_argument("--no-speed", action="store_true", help="mAP only, into the last JSON")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="images a second of CPU time, for a busy machine; pin it to one core with taskset",
    )
    parser.add_argument("--only", help="variants such as torch-fp32,openvino-int8; default: all")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    place = given.out / "runtimes.json"
    rows = json.loads(place.read_text())["rows"] if place.exists() else {}
    names = [
        name
        for name in variants(given.device)
        if given.only is None or "-".join(name) in given.only.split(",")
    ]
    if not given.no_speed:
        batches = [int(text) for text in given.batches.split(",")]
        for name, row in _speed_rows(given, names, batches).items():
            rows.setdefault(name, {}).update(row)
    if not given.no_map:
        for variant in names:
            row = rows.setdefault(" ".join(variant), {})
            row["map"] = accuracy(given.shared, given.out, variant, given.device)
            if variant[1] == "int8":
                row["int8"] = int8_facts(given.shared, given.out, variant, given.device)
    place.write_text(
        json.dumps(
            {"machine": machine(given.device), "cpu_time": given.cpu_time, "rows": rows}, indent=1
        )
        + "\n"
    )
    _table(rows)
    _say(machine(given.device))
    if not given.no_speed:
        _plot(rows, given.out / "runtimes.png", machine(given.device))


def _speed_rows(
    given: argparse.Namespace, names: list[Variant], batches: list[int]
) -> dict[str, dict[str, Any]]:
    detectors = {v: detector_of(timed_config(v, given.shared, given.out), given.device)
                 for v in names}  # fmt: skip
    photos = sorted((given.shared / "data/coco_ccby/images").rglob("*.jpg"))
    images = letterboxed(photos[: max(batches)], detectors[names[0]].preprocessing)
    boxes = [len(one) for one in detectors[names[0]].detect(images)]
    _say(f"{statistics.mean(boxes):.1f} boxes an image")
    # On a busy machine, seconds of CPU time on one core compare better than those of the wall.
    clock = time.process_time if given.cpu_time else time.perf_counter
    found = speeds(detectors, images, batches, given.rounds, clock)
    reference = _REFERENCE
    rows: dict[str, dict[str, Any]] = {}
    for variant in names:
        row: dict[str, Any] = {}
        for batch in batches:
            mine, theirs = found[batch][variant], found[batch][reference]
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            row[f"images_per_s_{batch}"] = round(statistics.median(mine), 3)
            row[f"ratio_{batch}"] = round(statistics.median(ratios), 3)
            row[f"ratio_{batch}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        rows[" ".join(variant)] = row
    return rows


def _table(rows: dict[str, dict[str, Any]]) -> None:
    columns = sorted(
        {k for row in rows.values() for k in row if k == "map" or re.search(r"_\d+$", k)}
    )
    _say(f"{'':18s}" + "".join(f"{name:>16s}" for name in columns))
    for name, row in rows.items():
        values = (row.get(column) for column in columns)
        _say(f"{name:18s}" + "".join(f"{'-' if v is None else format(v, '.2f'):>16s}"
                                     for v in values))  # fmt: skip


def _plot(rows: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted(
        {int(k.rsplit("_", 1)[1]) for row in rows.values() for k in row
         if re.fullmatch(r"ratio_\d+", k)}
    )  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for at, batch in enumerate(batches):
        places = np.arange(len(rows)) + (at - (len(batches) - 1) / 2) * 0.25
        values = [row.get(f"ratio_{batch}", 0) for row in rows.values()]
        axes.bar(places, values, width=0.24, label=f"batch {batch}")
    axes.set_xticks(range(len(rows)), [name.replace(" ", "\n") for name in rows])
    axes.set_ylabel("speed ÷ torch fp32")
    axes.set_title(f"YOLO-NAS S, 640². {title}", fontsize=9)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

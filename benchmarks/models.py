"""The timed YOLO-NAS S on every runtime that this machine has, made once below --out.

Graphs and INT8 models are made by the product's own ``labelfleet compile``. Random weights say
nothing of accuracy, so any loss is accepted: the INT8 model is the recipe's, heads in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.photos import write_files
from benchmarks.worker import CORES
from pipelines.config.run_config import RunConfig
from pipelines.models.artefact import with_artefact
from storage.objects.protocols import StorageOptions
from workers.detectors.protocol import Detector
from workers.models.load import load_detector
from workers.models.resolve import resolve_model
from workers.runtimes.choose import PRECISIONS, installed
from workers.spec import DeviceName, ModelRequest, ModelSpec

NAME = "yolo_nas_s"
_CALIBRATION = 48


def checkpoint(folder: Path, photos: Sequence[bytes]) -> Path:
    """Return the S with about 15 boxes an image on these photos; and a folder of them beside it."""
    path = folder / f"{NAME}-timed.safetensors"
    calibration = folder / "calibration"
    if not calibration.exists():
        write_files(calibration, photos[:_CALIBRATION])
    if not path.exists():
        from benchmarks.timed_model import write_timed_checkpoint

        write_timed_checkpoint(path, sorted(calibration.iterdir())[:12], name=NAME)
    return path


def variants(device: DeviceName) -> list[str]:
    """``runtime-precision`` of what runs here at what can be compared: not bf16 or fp16 on CPUs."""
    here = installed()
    return [
        f"{runtime}-{precision}"
        for (runtime, on), precisions in PRECISIONS.items()
        for precision in precisions
        if on == device and runtime in here
        if device == "cuda" or precision in ("fp32", "int8")
    ]


def spec_of(
    variant: str, checkpoint: Path, device: DeviceName, *, floor: float = 0.05
) -> ModelSpec:
    """Return the choices behind a variant's name, with its artefact, which is made the first
    time."""
    runtime, _, precision = variant.partition("-")
    request = ModelRequest(
        str(checkpoint),
        runtime=runtime,  # type: ignore[arg-type]  # from PRECISIONS
        precision=precision,  # type: ignore[arg-type]
    )
    spec = resolve_model(request, StorageOptions(), device=device)
    folder = checkpoint.parent
    config = RunConfig.model_validate({
        "name": "benchmark",
        "source": {"url": str(folder / "calibration")},
        "output": str(folder / "run"),
        "model": {
            "checkpoint": str(checkpoint), "runtime": runtime, "precision": precision,
            "max_loss": 100, "artefacts": str(folder / "artefacts"),
        },
    })  # fmt: skip
    return replace(with_artefact(config, spec), score_floor=floor)


def detector(
    variant: str, checkpoint: Path, device: DeviceName, *, floor: float = 0.05
) -> Detector:
    """Ready to run, on all cores of this machine where it runs on a CPU."""
    spec = spec_of(variant, checkpoint, device, floor=floor)
    return load_detector(spec, StorageOptions(), threads=CORES)

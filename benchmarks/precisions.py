"""mAP of every runtime and precision on the demo's handwritten pages, which need no download.

    python -m benchmarks.precisions [--device cuda] [--images 128] [--variants torch-fp16]

The model is the demo's. The pages are of handwriting that it has not seen; INT8 is calibrated on
other pages, and any loss is accepted, since the loss is what is asked for. The first variant is the
one that the others' losses refer to.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.models import variants
from benchmarks.rounds import Ratio, Report, chosen, parser, plain, say
from benchmarks.worker import CORES
from pipelines.config.run_config import RunConfig
from pipelines.config.yaml_files import parse_config
from pipelines.demo.digits import Pages, make_pages
from pipelines.models.artefact import with_artefact
from pipelines.models.measure import detect_all, expected_from_truth, mean_ap
from pipelines.models.requested import model_request
from pipelines.models.sample_images import measured
from storage.coco.truth import read_truth
from storage.objects.protocols import StorageOptions
from workers.models.load import load_detector
from workers.models.resolve import resolve_model
from workers.spec import DeviceName

DIGITS = Path(__file__).resolve().parents[1] / "pipelines/assets/digits_nano.safetensors"
REFERENCE = "torch-fp32"
FLOOR = 0.01
CALIBRATION = 64


def accuracy(
    variant: str, device: DeviceName, pages: Pages, calibration: Pages, out: Path
) -> float:
    """Return the mAP in points."""
    runtime, _, precision = variant.partition("-")

    def config(source: Path) -> RunConfig:
        fields = {
            "name": "precisions",
            "source": {"url": str(source)},
            "output": str(out / "run"),
            "model": {
                "checkpoint": str(DIGITS), "runtime": runtime, "precision": precision,
                "max_loss": 100, "artefacts": str(out / "artefacts"), "score_floor": FLOOR,
            },
        }  # fmt: skip
        return parse_config(RunConfig, fields, where="precisions")

    compiled = config(calibration.images)
    spec = resolve_model(model_request(compiled), StorageOptions(), device=device)
    spec = replace(with_artefact(compiled, spec), score_floor=FLOOR)
    detector = load_detector(spec, StorageOptions(), threads=CORES)
    truth = read_truth(str(pages.truth))
    inputs, indices = measured(config(pages.images), detector.preprocessing, truth)
    return mean_ap(
        detect_all(detector, inputs), expected_from_truth(truth, indices, detector.classes)
    )


def main() -> None:
    made = parser(__doc__, images=128, rounds=1)
    made.add_argument("--variants", help="comma-separated; default: all that are here")
    options = made.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = chosen(variants(options.device), options.variants)
    folder = options.out / f"pages-{options.images}"
    pages = make_pages(folder, images=options.images, seed=11, broken=False)
    calibration = make_pages(
        options.out / "calibration-pages", images=CALIBRATION, seed=12, split="train", broken=False
    )
    report = Report("precisions", "mAP", plain(options))
    for name in [REFERENCE, *(n for n in names if n != REFERENCE)]:
        score = accuracy(name, options.device, pages, calibration, options.out)
        report.values[name] = [score]
        say(f"{name:18s} {score:.2f} mAP")
        if name != REFERENCE:
            lost = report.values[REFERENCE][0] - score
            report.add(f"points lost by {name}", Ratio(lost, lost, lost))
    report.write(options.out)


if __name__ == "__main__":
    main()

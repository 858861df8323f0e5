"""The model that ships: small enough, free to use, and as good on unseen pages as its card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.demo.digits import make_pages
from storage.objects.protocols import StorageOptions
from workers.spec import ModelRequest
from workers.training.coco_set import read_training_set

ASSETS = Path(__file__).resolve().parents[3] / "pipelines" / "assets"
CHECKPOINT = ASSETS / "digits_nano.safetensors"


def test_it_is_small_and_says_what_it_is() -> None:
    from workers.checkpoints.file import read_checkpoint

    checkpoint = read_checkpoint(CHECKPOINT)
    weights = sum(1 for _ in checkpoint.shapes)
    values = sum(_product(shape) for shape in checkpoint.shapes.values())
    assert weights > 100
    assert values < 2_000_000
    assert CHECKPOINT.stat().st_size < 5_000_000
    assert checkpoint.classes == tuple("0123456789")
    assert checkpoint.licence == "Apache-2.0"
    assert checkpoint.image_size == (320, 320)
    card = (ASSETS / "MODEL_CARD.md").read_text()
    assert checkpoint.sha256 in card, "the card describes another file"


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


@pytest.mark.slow
def test_it_reads_pages_it_never_saw(tmp_path: Path) -> None:
    from pipelines.training.validation import measure
    from workers.models.load_torch import load_detector
    from workers.models.resolve import resolve_model

    # A seed that no other page of the project is drawn with.
    pages = make_pages(tmp_path, images=40, seed=77, split="unseen", broken=False)
    request = ModelRequest(checkpoint=str(CHECKPOINT), score_floor=0.01)
    spec = resolve_model(request, StorageOptions(), device="cpu")
    detector = load_detector(spec, StorageOptions(), threads=1)
    plain = measure(detector, read_training_set(pages.truth_plain, pages.images))
    whole = measure(detector, read_training_set(pages.truth, pages.images))
    assert plain.map50 > 0.93
    assert whole.map50 > 0.85

"""What only a GPU can show: CUDA graphs find what the CPU finds, and two batches never mix."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.demo.digits import make_pages
from storage.objects.protocols import StorageOptions
from storage.records import Detections
from workers.compile.agreement import BOX_PX, SCORE
from workers.detectors.protocol import QueueingDetector, Unfinished
from workers.images.decode import decode
from workers.images.letterbox import letterbox
from workers.models.load import load_detector
from workers.models.resolve import resolve_model
from workers.spec import ModelRequest, ModelSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPTIONS = StorageOptions()
DIGITS = Path(__file__).resolve().parents[3] / "pipelines/assets/digits_nano.safetensors"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    request = ModelRequest(checkpoint=str(DIGITS), runtime="torch", precision="fp32")
    return resolve_model(request, OPTIONS, device="cuda")


@pytest.fixture(scope="module")
def images(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.uint8]:
    folder = tmp_path_factory.mktemp("pages")
    pages = make_pages(folder, images=24, seed=5, split="unseen", broken=False)
    decoded = (decode(p.read_bytes(), max_pixels=10**8) for p in sorted(pages.images.iterdir()))
    return np.stack([letterbox(one.pixels, spec.preprocessing)[0] for one in decoded])


@pytest.fixture(scope="module")
def on_cpu(spec: ModelSpec, images: NDArray[np.uint8]) -> Sequence[Detections]:
    return load_detector(replace(spec, device="cpu"), OPTIONS, threads=2).detect(images)


def queueing(spec: ModelSpec) -> QueueingDetector:
    detector = load_detector(spec, OPTIONS, threads=2)
    assert isinstance(detector, QueueingDetector)
    return detector


def assert_same(found: Sequence[Detections], wanted: Sequence[Detections]) -> None:
    for a, b in zip(found, wanted, strict=True):
        i, j = (np.lexsort((d.category_ids, d.anchor)) for d in (a, b))
        np.testing.assert_array_equal(a.anchor[i], b.anchor[j])
        np.testing.assert_allclose(a.boxes[i], b.boxes[j], atol=BOX_PX)
        np.testing.assert_allclose(a.scores[i], b.scores[j], atol=SCORE)


def test_fp32_finds_what_the_cpu_finds_at_any_batch_size(
    spec: ModelSpec, images: NDArray[np.uint8], on_cpu: Sequence[Detections]
) -> None:
    detector = queueing(spec)
    for size in (3, 24, 8, 1, 5):  # of its own size, or in a larger graph
        assert_same(detector.detect(images[:size]), on_cpu[:size])


def test_two_batches_under_way_do_not_mix(
    spec: ModelSpec, images: NDArray[np.uint8], on_cpu: Sequence[Detections]
) -> None:
    detector = queueing(spec)
    buffers = [detector.empty(8) for _ in range(3)]
    chance = np.random.default_rng(0)
    under_way: deque[tuple[NDArray[np.int64], Callable[[], Unfinished]]] = deque()
    for turn in range(300):
        picked = chance.choice(len(images), chance.integers(1, 9), replace=False)
        batch = buffers[turn % 3][: len(picked)]
        batch[:] = images[picked]
        under_way.append((picked, detector.launch(batch)))
        if len(under_way) == 2:
            before, wait = under_way.popleft()
            assert_same(wait()(), [on_cpu[i] for i in before])


def test_fp16_finds_the_same_objects(
    spec: ModelSpec, images: NDArray[np.uint8], on_cpu: Sequence[Detections]
) -> None:
    found = queueing(replace(spec, precision="fp16")).detect(images)
    for a, b in zip(found, on_cpu, strict=True):
        sure = b.anchor[b.scores > 0.5]
        assert len(set(sure.tolist()) - set(a.anchor.tolist())) <= 0.02 * len(sure) + 1


def test_batches_wait_in_page_locked_memory(spec: ModelSpec) -> None:
    assert torch.from_numpy(queueing(spec).empty(2)).is_pinned()

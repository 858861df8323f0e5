"""The loss with regions to ignore, and the loop: it learns, stops, continues, and says when not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from storage.errors import ConfigError, ModelError, StorageFull, WorkerError
from tests.support.samples.training_samples import box, write_coco
from workers.images.preprocessing import Preprocessing
from workers.training.batches import BatchSource, TrainingBatch
from workers.training.coco_set import TrainingSet, read_training_set
from workers.training.options import FitOptions, LrFactors
from workers.training.recipe.augmentation import Augmentation

pytestmark = pytest.mark.slow  # super-gradients takes seconds to import

ARCH = Path(__file__).resolve().parents[3] / "pipelines" / "assets" / "digits_nano_arch.yaml"
SIDE = 96
IDS = (7, 3, 90)
PREPROCESSING = Preprocessing(size=(SIDE, SIDE), resize_to=(92, 92))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0) -> nn.Module:
    from workers.yolo_nas.network import build_network

    torch.manual_seed(seed)
    return build_network("yolo_nas_s", json.dumps(yaml.safe_load(ARCH.read_text())), 3)


def raw_outputs(seed: int = 0) -> tuple[Any, ...]:
    """A training-mode forward of random images: scores, distances, anchors and their points."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((2, 3, SIDE, SIDE), generator=generator)
    _, raw = network(seed).train()(images)
    return tuple(raw)


@pytest.fixture
def source(tmp_path: Path) -> BatchSource:
    """Four grey images, each with one coloured square per class."""
    corners = [(n, c, 12 + 26 * k, 8 + 16 * n) for n in (1, 2, 3, 4) for k, c in enumerate(IDS)]
    boxes = [box(n, c, x, y, 20, 20) for n, c, x, y in corners]
    path = write_coco(tmp_path, [(SIDE, SIDE)] * 4, boxes)
    from PIL import Image

    for n in (1, 2, 3, 4):
        pixels = np.full((SIDE, SIDE, 3), 90, np.uint8)
        for k in range(3):
            pixels[8 + 16 * n : 28 + 16 * n, 12 + 26 * k : 32 + 26 * k, k] = 250
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    return BatchSource(
        read_training_set(path, tmp_path), PREPROCESSING, Augmentation.none(), batch_size=4, seed=0
    )


TARGETS = torch.tensor([[0, 1, 30.0, 30, 24, 24], [1, 2, 60, 50, 30, 40]])


def test_without_regions_the_loss_is_super_gradients_own() -> None:
    from workers.training.loss import RegionLoss

    from super_gradients.training.losses.ppyolo_loss import PPYoloELoss  # isort: skip

    outputs = raw_outputs()
    own, own_parts = RegionLoss(3)(outputs, TARGETS)
    theirs, their_parts = PPYoloELoss(3, use_static_assigner=False)(outputs, TARGETS)
    assert own.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert own_parts.tolist() == pytest.approx(their_parts.tolist(), rel=1e-6)


def test_regions_silence_unclaimed_anchors_inside_and_nothing_else() -> None:
    from workers.training.loss import RegionLoss, anchors_inside

    scores, *rest = raw_outputs()
    scores = scores.detach().requires_grad_()
    rest[0] = rest[0].detach()
    # Over the object of image 0 and around it; image 1 has none.
    regions = torch.tensor([[0, 10.0, 10, 60, 96]])
    loss = RegionLoss(3)
    (with_regions,) = torch.autograd.grad(loss((scores, *rest), TARGETS, regions)[0], scores)
    (without,) = torch.autograd.grad(loss((scores, *rest), TARGETS)[0], scores)
    silent = anchors_inside(rest[2], regions, 2)
    changed = (with_regions != without).any(dim=-1)
    assert silent[0].sum() > 10
    assert not silent[1].any()
    assert not (changed & ~silent).any()
    claimed = silent & ~changed
    assert claimed.any(), "the object inside the region is still taught"
    assert (with_regions[changed] == 0).all()
    assert (without[changed] > 0).all(), "it would have been taught as background"


def test_the_regions_of_one_batch_do_not_linger_in_the_next() -> None:
    from workers.training.loss import RegionLoss

    outputs, loss = raw_outputs(), RegionLoss(3)
    before = loss(outputs, TARGETS)[0].item()
    region = torch.tensor([[1, 0.0, 0, 96, 96]])
    assert loss(outputs, TARGETS, region)[0].item() < before
    assert loss(outputs, TARGETS, torch.zeros((0, 5)))[0].item() == before
    assert loss(outputs, TARGETS)[0].item() == before


def test_a_batch_without_any_object_has_a_loss_that_can_be_trained_on() -> None:
    from workers.training.loss import RegionLoss

    scores, *rest = raw_outputs()
    loss, _ = RegionLoss(3)((scores, *rest), torch.zeros((0, 6)))
    assert loss.item() > 0
    loss.backward()


def trainer(state: Path, options: FitOptions, **more: Any) -> Any:
    from workers.training.trainer import Trainer

    fields = {"fingerprint": "one", "state": state, **more}
    return Trainer(network(), 3, options, **fields)


def weights(of: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in of.ema_network.state_dict().items()}


def test_it_learns_a_handful_of_images_by_heart(source: BatchSource, tmp_path: Path) -> None:
    from pipelines.training.validation import measure
    from workers.runtimes.torch_session import torch_detector
    from workers.spec import ModelSpec
    from workers.yolo_nas.dense import DenseDetector
    from workers.yolo_nas.network import fuse

    options = FitOptions(steps=240, lr=5e-3, warmup_steps=10, ema_decay=0.9, eval_every=240)
    losses: list[float] = []
    training = trainer(tmp_path / "state.pt", options)
    training.run(source.stream, lambda _: 0.0, lambda _: None, lambda r: losses.append(r.loss))
    # Not the mean of the first steps: until an object is claimed there is nearly no loss.
    assert np.mean(losses[-10:]) < 0.5 * max(losses[:20])
    spec = ModelSpec(
        "", "", "yolo_nas_s", None, source.training_set.classes, (0, 1, 2), PREPROCESSING,
        "torch", "fp32", "cpu", 0.01, 0.7, 300,
    )  # fmt: skip
    dense = DenseDetector(fuse(training.ema_network, (SIDE, SIDE)), PREPROCESSING)
    assert isinstance(source.training_set, TrainingSet)
    scores = measure(torch_detector(dense.eval(), spec), source.training_set)
    assert scores.map50 > 0.9
    assert scores.objects == 12


def test_a_stopped_training_continues_as_if_it_had_not_stopped(
    source: BatchSource, tmp_path: Path
) -> None:
    options = FitOptions(steps=6, warmup_steps=2, eval_every=4)
    seen: list[int] = []

    def run(state: str, stop_after: int) -> Any:
        training = trainer(tmp_path / state, options)
        done: list[int] = []
        training.run(
            source.stream, lambda _: 0.5, lambda _: None,
            lambda report: (done.append(report.step), seen.append(report.step)),
            lambda: done[-1] >= stop_after,
        )  # fmt: skip
        return training

    whole = run("whole.pt", 6)
    seen.clear()
    first = run("parts.pt", 3)
    assert first.progress.step == 3
    second = run("parts.pt", 6)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert second.progress.history == whole.progress.history
    for key, value in weights(whole).items():
        assert torch.allclose(value.float(), weights(second)[key].float(), atol=1e-6), key


def test_the_best_averaged_weights_are_kept_not_the_last(
    source: BatchSource, tmp_path: Path
) -> None:
    options = FitOptions(steps=8, warmup_steps=2, eval_every=2)
    scores = iter([0.1, 0.7, 0.3, 0.2])
    kept: list[dict[str, torch.Tensor]] = []
    training = trainer(tmp_path / "state.pt", options)
    progress = training.run(
        source.stream, lambda _: next(scores), lambda _: kept.append(weights(training)),
        lambda _: None,
    )  # fmt: skip
    assert (progress.best_step, progress.best_score) == (4, 0.7)
    assert len(kept) == 2
    assert any(not torch.equal(kept[-1][k], v) for k, v in weights(training).items())


def test_a_full_disk_under_the_state_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "state.partial").symlink_to("/dev/full")
    with pytest.raises(StorageFull, match=r"no space left for .*state\.partial"):
        trainer(tmp_path / "state.pt", FitOptions(steps=4)).save()
    assert not list(tmp_path.iterdir())  # nor does the part of it take the room that is left


def test_another_training_cannot_take_over_a_state_file(tmp_path: Path) -> None:
    options = FitOptions(steps=4)
    trainer(tmp_path / "state.pt", options).save()
    with pytest.raises(ConfigError, match="another config"):
        trainer(tmp_path / "state.pt", options, fingerprint="two")


def test_a_worker_with_another_state_than_the_leading_one_does_not_train(tmp_path: Path) -> None:
    from workers.training.distributed import Team

    class Behind(Team):
        def agree(self, value: float) -> float:
            return value + 2

    with pytest.raises(WorkerError, match="step 0, the leading one from step 2"):
        trainer(tmp_path / "state.pt", FitOptions(steps=3), team=Behind(1, 2))


def test_a_loss_that_is_no_number_stops_with_advice(source: BatchSource, tmp_path: Path) -> None:
    def poisoned(first: int, end: int) -> Iterator[TrainingBatch]:
        for step, batch in enumerate(source.stream(first, end)):
            yield replace(batch, images=batch.images * torch.nan) if step == 2 else batch

    training = trainer(tmp_path / "state.pt", FitOptions(steps=5, eval_every=100))
    with pytest.raises(ModelError, match="nan at step 3") as caught:
        training.run(poisoned, lambda _: 0.0, lambda _: None, lambda _: None)
    assert "lower lr" in str(caught.value.hint)
    assert training.progress.step == 2


def test_the_average_follows_the_weights_quickly_at_first_and_slowly_later() -> None:
    from workers.training.ema import Ema

    layer = nn.Linear(1, 1)
    ema = Ema(layer, 0.99)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        ema.network.weight.fill_(0.0)  # type: ignore[union-attr,operator]
    ema.update(layer, 1)
    assert ema.network.weight.item() == pytest.approx(10 / 11)  # type: ignore[union-attr,operator]
    with torch.no_grad():
        ema.network.weight.fill_(0.0)  # type: ignore[union-attr,operator]
    ema.update(layer, 10_000)
    assert ema.network.weight.item() == pytest.approx(0.01)  # type: ignore[union-attr,operator]


def test_it_ends_early_when_nothing_gains(source: BatchSource, tmp_path: Path) -> None:
    options = FitOptions(steps=20, warmup_steps=1, eval_every=2, early_stop=2)
    scores = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    training = trainer(tmp_path / "state.pt", options)
    progress = training.run(source.stream, lambda _: next(scores), lambda _: None, lambda _: None)
    assert (progress.step, progress.best_step) == (8, 4)  # two validations after the best
    assert training.done
    again = trainer(tmp_path / "state.pt", options)
    assert again.run(source.stream, lambda _: 1.0, lambda _: None, lambda _: None).step == 8


def test_the_state_is_saved_by_time_too(source: BatchSource, tmp_path: Path) -> None:
    now = iter(range(0, 10_000, 40))  # seconds, at each look at the clock
    options = FitOptions(steps=6, warmup_steps=1, eval_every=100, save_every_s=200)
    training = trainer(tmp_path / "state.pt", options, clock=lambda: next(now))
    saved: list[int] = []

    def killed(report: Any) -> None:
        saved.append(int((tmp_path / "state.pt").exists()))
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(source.stream, lambda _: 0.0, lambda _: None, killed)
    assert saved[0] == 0
    assert saved[-1] == 1
    assert 1 <= trainer(tmp_path / "state.pt", options).progress.step < 5


def test_a_batch_that_does_not_fit_is_one_line_with_advice(
    source: BatchSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(tmp_path / "state.pt", FitOptions(steps=2, warmup_steps=1))

    def full(_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(training, "_forward", full)
    with pytest.raises(ModelError, match="does not fit into memory") as caught:
        training.run(source.stream, lambda _: 0.0, lambda _: None, lambda _: None)
    assert len(caught.value.message.splitlines()) == 1
    assert f"batch_size: {source.batch_size // 2}" in str(caught.value.hint)


def test_parts_of_a_batch_have_the_gradient_of_the_whole() -> None:
    """Exactly so but for BatchNorm, which is left out here by taking one forward for both."""
    from workers.training.loss import RegionLoss
    from workers.training.recipe.update import assigned_score

    scores, *rest = (o.detach() if torch.is_tensor(o) else o for o in raw_outputs())
    scores.requires_grad_()
    # Boxes of three strides a side, which overlap the targets: their scores are not near 0.
    rest[0] = torch.zeros_like(rest[0]).view(2, -1, 4, 17)
    rest[0][..., 1:3] = 8
    rest[0] = rest[0].flatten(2)
    loss = RegionLoss(3)
    # Unlike numbers of objects: a mean over the parts would weigh them wrongly.
    more = torch.tensor([[0, 0, 20.0 + 8 * k, 60, 12, 12] for k in range(5)])
    targets = torch.cat([TARGETS, more])
    whole, whole_parts = loss((scores, *rest), targets)
    (wanted,) = torch.autograd.grad(whole, scores)
    summed, parts_sum, score = torch.zeros_like(scores), torch.zeros(4), 0.0
    for k in (0, 1):
        own = targets[targets[:, 0] == k].clone()
        own[:, 0] = 0
        part, parts = loss((scores[k : k + 1], rest[0][k : k + 1], *rest[1:]), own)
        of_part = assigned_score(loss.assignment.scores)
        divided_by = max(of_part, 1.0)
        summed += torch.autograd.grad(part * divided_by, scores)[0]
        parts_sum += parts * divided_by
        score += of_part
    assert score > 2
    assert torch.allclose(summed / max(score, 1.0), wanted, rtol=1e-4, atol=1e-7)
    assert torch.allclose(parts_sum / max(score, 1.0), whole_parts, rtol=1e-4)


def test_accumulated_steps_learn_and_report_the_loss_of_the_whole_batch(
    source: BatchSource, tmp_path: Path
) -> None:
    options = FitOptions(steps=3, warmup_steps=0, lr=1e-3, eval_every=3)
    losses: dict[int, list[float]] = {}
    for parts in (1, 2):
        training = trainer(tmp_path / f"{parts}.pt", replace(options, accumulate=parts))
        training.run(
            source.stream, lambda _: 0.5, lambda _: None,
            lambda r, p=parts: losses.setdefault(p, []).append(r.loss),
        )  # fmt: skip
    # The images are alike, and so are BatchNorm's statistics of two and of four of them.
    assert losses[2][0] == pytest.approx(losses[1][0], rel=0.3)
    assert losses[2] != losses[1]


def test_a_frozen_stem_stays_as_the_checkpoint_has_it(source: BatchSource, tmp_path: Path) -> None:
    training = trainer(tmp_path / "s.pt", FitOptions(steps=2, warmup_steps=0, freeze="stem"))
    first = {k: v.clone() for k, v in network().state_dict().items()}
    training.run(source.stream, lambda _: 0.5, lambda _: None, lambda _: None)
    averaged = training.ema_network.state_dict()
    for name, value in first.items():
        frozen = name.startswith("backbone.stem.")
        if frozen:
            assert torch.equal(averaged[name], value), name
    assert not torch.equal(averaged["neck.neck1.conv.conv.weight"],
                           first["neck.neck1.conv.conv.weight"])  # fmt: skip


def test_a_recipe_in_full_stops_and_continues_as_if_it_had_not(
    source: BatchSource, tmp_path: Path
) -> None:
    mixed = replace(
        source,
        augmentation=Augmentation(mosaic=0.5, mixup=0.3, rotate_deg=5, shear_deg=2, blur=0.3),
        mixed_steps=4,
        multi_scale=(0.7, 1.3),
    )
    options = FitOptions(
        steps=5, warmup_steps=1, eval_every=5, clip_norm=10, accumulate=2, freeze="stem",
        lr_factors=LrFactors(0.1, 0.5, 1.0),
    )  # fmt: skip
    ends = []
    for name, stop_after in (("whole.pt", 5), ("parts.pt", 2), ("parts.pt", 5)):
        training = trainer(tmp_path / name, options)
        training.run(
            mixed.stream, lambda _: 0.5, lambda _: None, lambda _: None,
            lambda t=training, s=stop_after: t.progress.step >= s,
        )  # fmt: skip
        ends.append(weights(training))
    for key, value in ends[0].items():
        assert torch.allclose(value.float(), ends[2][key].float(), atol=1e-6), key

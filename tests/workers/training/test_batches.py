"""Batches are a pure function of seed and step: that is what makes a training resumable."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.errors import SourceError
from tests.support.samples.training_samples import box, write_coco
from workers.images.preprocessing import Preprocessing, ValueRange
from workers.training.augment import SoftTargets, TrainingSample
from workers.training.batches import BatchSource, collate
from workers.training.coco_set import TrainingSet, read_training_set
from workers.training.recipe.augmentation import Augmentation
from workers.training.samples import Samples

PREPROCESSING = Preprocessing(size=(64, 64), resize_to=(60, 60))


@dataclass(frozen=True, slots=True)
class AllPseudo:
    """A set as if a model had labelled all of it."""

    inner: Samples

    classes = official_ids = digest = property(lambda self: None)

    def __len__(self) -> int:
        return len(self.inner)

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        return replace(self.inner.sample(index, value_range), pseudo=True)


@pytest.fixture
def source(tmp_path: Path) -> BatchSource:
    # As many boxes as the image's number tell the images apart in a batch.
    sizes = [(40 + 10 * n, 50) for n in range(7)]
    boxes = [box(n, 7, 4 * k, 10, 8, 8) for n in range(1, 8) for k in range(n)]
    path = write_coco(tmp_path, sizes, boxes)
    return BatchSource(
        read_training_set(path, tmp_path), PREPROCESSING, Augmentation.none(), batch_size=3, seed=4
    )


def test_an_epoch_shows_every_image_once(source: BatchSource) -> None:
    seen: list[int] = []
    for step in range(7):  # 21 places: three epochs of 7 images
        targets = source.batch(step).targets
        seen += [int((targets[:, 0] == slot).sum()) for slot in range(3)]
    epochs = [seen[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5, 6, 7] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_stream_is_the_same_wherever_it_starts_and_however_many_threads(
    source: BatchSource,
) -> None:
    lively = replace(source, augmentation=Augmentation(flip_horizontal=0.5), threads=3)
    whole = list(lively.stream(0, 9))
    later = list(replace(lively, threads=1).stream(5, 9))
    assert len(whole) == 9
    for a, b in zip(whole[5:], later, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_parts_of_a_batch_are_its_slots_each_once(source: BatchSource, world: int) -> None:
    lively = replace(source, augmentation=Augmentation(flip_horizontal=0.5), batch_size=6)
    for step in (0, 1, 5):
        whole = lively.batch(step)
        for rank in range(world):
            part = lively.part(step, rank, world)
            slots = list(range(rank, 6, world))
            assert torch.equal(part.images, whole.images[slots])
            for place, slot in enumerate(slots):
                mine = part.targets[part.targets[:, 0] == place, 1:]
                assert torch.equal(mine, whole.targets[whole.targets[:, 0] == slot, 1:])
        streamed = next(iter(lively.stream(step, step + 1, world - 1, world)))
        assert torch.equal(streamed.images, whole.images[world - 1 :: world])


def test_another_seed_gives_another_order(source: BatchSource) -> None:
    other = replace(source, seed=5)
    assert any(not torch.equal(source.batch(s).targets, other.batch(s).targets) for s in range(5))


def test_images_are_contiguous_nchw_and_targets_are_in_input_pixels() -> None:
    sample = TrainingSample(
        np.full((64, 64, 3), 51, np.uint8),
        np.array([[10, 20, 30, 60]], np.float32),
        np.array([2], np.int64),
        np.array([[1, 2, 3, 4]], np.float32),
    )
    batch = collate([sample, sample], PREPROCESSING)
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.images.is_contiguous()
    assert batch.images.unique().tolist() == pytest.approx([0.2])
    assert batch.targets.tolist() == [[0, 2, 20, 40, 20, 40], [1, 2, 20, 40, 20, 40]]
    assert batch.ignore.tolist() == [[0, 1, 2, 3, 4], [1, 1, 2, 3, 4]]
    assert batch.silent is not None
    assert batch.silent.shape == (0, 6)
    silent = replace(sample, silent=np.array([[2, 0, 0, 64, 64]], np.float32))
    batch = collate([sample, silent], PREPROCESSING)
    assert batch.silent is not None
    assert batch.silent.tolist() == [[1, 2, 0, 0, 64, 64]]


def test_channels_mean_and_std_are_those_of_the_preprocessing() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:] = (255, 0, 51)
    none = np.zeros((0, 4), np.float32)
    sample = TrainingSample(pixels, none, np.zeros(0, np.int64), none)
    bgr = replace(PREPROCESSING, channels="BGR", mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    first = collate([sample], bgr).images[0, :, 0, 0]
    assert first.tolist() == pytest.approx([0.2, -0.2, 0.35])


def test_an_image_damaged_since_it_was_checked_is_named(source: BatchSource) -> None:
    assert isinstance(source.training_set, TrainingSet)
    damaged = source.training_set.images[2].path
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(SourceError, match=damaged.name):
        list(source.stream(0, 3))


def test_a_plain_set_counts_every_box_fully_and_stores_nothing(source: BatchSource) -> None:
    batch = source.batch(0)
    assert batch.weights.tolist() == [1.0] * len(batch.targets)
    assert batch.checked.shape == (0, 5)
    assert batch.soft_scores is None
    assert batch.spread is None


def test_stored_knowledge_stays_aligned_and_people_have_none() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    boxes = np.array([[0, 0, 9, 9], [9, 9, 30, 30]], np.float32)
    labels = np.array([0, 1], np.int64)
    region = np.array([[0, 0, 64, 64]], np.float32)
    none = np.zeros((0, 4), np.float32)
    soft = SoftTargets(
        np.array([[0.9, 0.1], [0.2, 0.7]], np.float32),
        np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32),
        np.array([True, False]),
    )
    people = TrainingSample(pixels, boxes, labels, none, checked=region)
    model = TrainingSample(
        pixels, boxes, labels, none, np.array([1, 0.25], np.float32), soft, pseudo=True
    )
    batch = collate([people, model], PREPROCESSING)
    assert batch.weights.tolist() == [1, 1, 1, 0.25]
    assert batch.checked.tolist() == [[0, 0, 0, 64, 64]]
    assert batch.soft_scores is not None
    assert batch.spread is not None
    assert torch.isnan(batch.soft_scores[:3]).all()
    assert torch.isnan(batch.spread[:3]).all()
    assert batch.soft_scores[3].tolist() == pytest.approx([0.2, 0.7])
    assert batch.spread[3].tolist() == [5, 6, 7, 8]


def digest(source: BatchSource, steps: int = 4) -> str:
    """Of all that the first batches hold."""
    found = hashlib.sha256()
    for step in range(steps):
        batch = source.batch(step)
        for part in (batch.images, batch.targets, batch.ignore):
            found.update(part.numpy().tobytes())
    return found.hexdigest()[:16]


def test_the_batches_of_older_configs_are_the_same_bit_for_bit(source: BatchSource) -> None:
    # As the version before mosaic, mixup, turns, blur and sizes drew them, from flat images:
    # interpolation of other pixels may differ between builds of OpenCV.
    lively = replace(source, augmentation=Augmentation(flip_vertical=0.5))
    assert digest(lively) == "fa15a51860fc2ded"
    pseudo = replace(lively, pseudo_augmentation=Augmentation(mosaic=1.0), mixed_steps=2)
    assert digest(pseudo) == digest(lively)


def test_mixing_is_a_function_of_seed_and_step_and_ends_where_it_is_closed(
    source: BatchSource,
) -> None:
    plain = Augmentation.none()
    mixing = replace(source, augmentation=replace(plain, mosaic=0.6, mixup=0.4), mixed_steps=6)
    again = list(replace(mixing, threads=3).stream(0, 9))
    differs = []
    for step in range(9):
        batch = mixing.batch(step)
        assert torch.equal(batch.images, again[step].images)
        assert torch.equal(batch.targets, again[step].targets)
        differs.append(not torch.equal(batch.images, source.batch(step).images))
    assert all(differs[:6])
    assert not any(differs[6:])


def test_partners_come_from_the_whole_set_and_change_with_the_step(source: BatchSource) -> None:
    seen = [len(source._partner(number, k).boxes) for number in range(7) for k in range(4)]
    assert sorted(seen) == sorted([1, 2, 3, 4, 5, 6, 7] * 4)


def test_pseudo_labelled_images_get_the_stronger_augmentation(source: BatchSource) -> None:
    strong = replace(source, pseudo_augmentation=replace(Augmentation.none(), brightness=0.9))
    assert torch.equal(strong.batch(0).images, source.batch(0).images)
    pseudo = replace(strong, training_set=AllPseudo(source.training_set))
    assert not torch.equal(pseudo.batch(0).images, source.batch(0).images)
    assert torch.equal(pseudo.batch(0).targets, source.batch(0).targets)


def test_the_size_is_drawn_by_step_and_boxes_follow_it(source: BatchSource) -> None:
    many = replace(
        source,
        preprocessing=Preprocessing(size=(160, 160), resize_to=(156, 156)),
        multi_scale=(0.6, 1.4),
    )
    shapes = [tuple(many.batch(step).images.shape[2:]) for step in range(12)]
    assert shapes == [many.preprocessing_at(step).size for step in range(12)]
    assert set(shapes) <= {(s, s) for s in (96, 128, 160, 192, 224)}
    assert len(set(shapes)) >= 3
    one = replace(many, multi_scale=None)
    for step, (side, _) in enumerate(shapes):
        found, wanted = many.batch(step).targets, one.batch(step).targets
        assert torch.allclose(found[:, 2:] / (side - 4), wanted[:, 2:] / 156, atol=0.03)


class _OneObject:
    """A set of one image of 64×128 pixels with one box, of which a spread is stored."""

    classes = ("a", "b")
    official_ids = (1, 2)
    digest = "0" * 16

    def __len__(self) -> int:
        return 1

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        soft = SoftTargets(
            np.array([[0.2, 0.7]], np.float32), np.array([[1, 2, 3, 4]], np.float32),
            np.array([False]),
        )  # fmt: skip
        return TrainingSample(
            np.zeros((64, 128, 3), np.uint8), np.array([[50, 20, 80, 44]], np.float32),
            np.array([1]), np.zeros((0, 4), np.float32), soft=soft,
        )  # fmt: skip


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.25])
def test_the_spread_is_constant_in_input_pixels_whatever_the_scale(scale: float) -> None:
    """It is that of the letterbox, here of a half, so that it is constant in strides."""
    how = Preprocessing(size=(64, 64), resize_to=(64, 64))
    augmentation = replace(Augmentation.none(), scale=(scale, scale))
    batch = BatchSource(_OneObject(), how, augmentation, batch_size=1, seed=0).batch(0)
    assert batch.targets[0, 4].item() == pytest.approx(15 * scale, abs=0.2)
    assert batch.spread is not None
    assert batch.spread.tolist() == [[0.5, 1, 1.5, 2]]


@dataclass(frozen=True, slots=True)
class Silent(AllPseudo):
    """Gives its samples once ``over`` is set."""

    over: threading.Event = field(default_factory=threading.Event)

    def sample(self, index: int, value_range: ValueRange = "full") -> TrainingSample:
        self.over.wait(60)
        return self.inner.sample(index, value_range)


def test_an_interrupted_stream_does_not_wait_for_a_source_that_is_silent(
    source: BatchSource,
) -> None:
    silent = Silent(source.training_set)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    last = threading.Timer(10, silent.over.set)
    last.start()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(replace(source, training_set=silent, threads=2).stream(0, 9))
        assert not silent.over.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        last.cancel()
        silent.over.set()

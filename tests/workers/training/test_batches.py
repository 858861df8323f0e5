"""Batches are a pure function of seed and step: that is what makes a training resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.errors import SourceError
from tests.support.samples.training_samples import box, write_coco
from workers.images.preprocessing import Preprocessing
from workers.training.augment import Augmentation, SoftTargets, TrainingSample
from workers.training.batches import BatchSource, collate
from workers.training.coco_set import TrainingSet, read_training_set

PREPROCESSING = Preprocessing(size=(64, 64), resize_to=(60, 60))


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

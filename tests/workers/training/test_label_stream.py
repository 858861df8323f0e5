"""A label version as a training set: targets, weights, bytes from their shards, bad input."""

from __future__ import annotations

import gzip
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.policy.policy import Policy
from storage.boxes import clipped
from storage.errors import ConfigError, LabelfleetError, SourceError, StorageUnavailable
from storage.labels.images import StreamImages
from storage.labels.stream import LabelIndex, read_label_index
from storage.labels.versions import read_version
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.shards.node_cache import NodeCache
from storage.stores.memory import MemoryStore
from tests.support.faulty import FaultyStore, fail
from tests.support.patience import patient
from tests.support.samples.image_samples import picture
from tests.support.samples.label_version import CALIBRATED, UNDECIDED, labelled
from tests.support.samples.labelled_run import CLASSES, png
from tests.support.samples.tar_samples import tar_of, zipped
from workers.training.label_stream import LabelStream

SIZE = (53, 37)  # of the pictures


def indexed(
    policy: Policy = CALIBRATED, *, stored: bool = False
) -> tuple[Manifest, MemoryStore, LabelIndex]:
    source = MemoryStore()
    manifest = labelled(source, MemoryStore(), policy)
    version = read_version(manifest.store)
    weigh = policy.thresholds(version.categories).probability if policy.calibration else None
    return manifest, source, read_label_index(manifest, version, weigh=weigh, stored=stored)


def stream(
    folder: Path, policy: Policy = CALIBRATED, *, stored: bool = False, band: bool = True
) -> LabelStream:
    manifest, source, index = indexed(policy, stored=stored)
    images = StreamImages(manifest, source, index, NodeCache(folder, 1 << 20))
    return LabelStream(index, images, CLASSES, (1, 2), np.array([0, 1]), band=band)


def ids_of(made: LabelStream) -> dict[str, int]:
    return {made.index.place(n).image_id: n for n in range(len(made))}


def test_every_ok_image_is_there_with_its_pixels(tmp_path: Path) -> None:
    made = stream(tmp_path)
    seeds = {f"loose/{i:03}.png": i for i in range(4)}
    seeds |= {f"tars/0.tar/{m}.png": 10 + m for m in range(3)}
    seeds |= {f"tars/1.tar.gz/{m}.png": 20 + m for m in range(3)}
    assert ids_of(made).keys() == seeds.keys()
    for image_id, number in ids_of(made).items():
        np.testing.assert_array_equal(
            made.sample(number).pixels, picture(seed=seeds[image_id]), err_msg=image_id
        )


def test_the_models_boxes_weigh_their_probability_and_peoples_one(tmp_path: Path) -> None:
    made = stream(tmp_path)
    rows = {row.image_id: row for row in live_rows(indexed()[0])}
    for image_id, number in ids_of(made).items():
        sample = made.sample(number)
        if image_id == "loose/000.png":
            assert sample.boxes.tolist() == [[5, 6, 25, 30]]
            assert sample.labels.tolist() == [0]
        elif image_id == "loose/001.png":
            assert len(sample.boxes) == 0, "a person saw that there is nothing"
        else:
            found = rows[image_id].detections
            assert sample.boxes.tolist() == clipped(found.boxes, *SIZE).tolist()
            assert sample.labels.tolist() == found.category_ids.tolist()
            assert sample.weights.tolist() == pytest.approx([0.4 + 0.6 * found.scores[0]])
        people = image_id in ("loose/000.png", "loose/001.png")
        assert sample.checked.tolist() == ([[0, 0, *SIZE]] if people else [])
        assert sample.pseudo != people
        if people:
            assert sample.weights.tolist() == [1.0] * len(sample.boxes)
        assert sample.soft is None


def test_a_silent_class_is_so_on_the_models_images_alone(tmp_path: Path) -> None:
    plain = stream(tmp_path)
    made = replace(plain, silent={1: "nothing of it is accepted"})
    assert made.digest != plain.digest == replace(plain, silent={}).digest
    for image_id, number in ids_of(made).items():
        people = image_id in ("loose/000.png", "loose/001.png")
        assert made.sample(number).silent.tolist() == ([] if people else [[1, 0, 0, *SIZE]])
        assert plain.sample(number).silent.shape == (0, 5)


def test_undecided_boxes_are_regions_to_ignore_unless_the_band_is_left_out(
    tmp_path: Path,
) -> None:
    for band in (True, False):
        made = stream(tmp_path, UNDECIDED, band=band)
        for image_id, number in ids_of(made).items():
            if not image_id.startswith("tars/"):
                continue
            sample = made.sample(number)
            assert len(sample.boxes) == 0
            assert len(sample.ignore) == (1 if band else 0)
    assert made.objects == 1


def test_stored_scores_are_scattered_into_the_classes_and_people_have_none(
    tmp_path: Path,
) -> None:
    made = stream(tmp_path, stored=True)
    # The training knows three classes; the run's are its third and first.
    made = replace(
        made, classes=("bright", "blur", "dark"), official_ids=(1, 2, 3),
        class_index=np.array([2, 0]),
    )  # fmt: skip
    of = ids_of(made)
    soft = made.sample(of["tars/0.tar/1.png"]).soft
    assert soft is not None
    assert soft.scores.tolist() == [[0.25, 0.0, 0.5]]
    scale = 53 / 64  # from the detector's input to the picture
    assert soft.spread[0].tolist() == pytest.approx([scale] * 4)
    assert soft.human.tolist() == [False]
    soft = made.sample(of["loose/000.png"]).soft
    assert soft is not None
    assert soft.human.tolist() == [True]
    assert np.isnan(soft.scores).all()
    assert np.isnan(soft.spread).all()


def test_boxes_of_a_class_that_is_not_learned_are_ignored(tmp_path: Path) -> None:
    whole = stream(tmp_path)
    made = replace(whole, classes=("bright",), class_index=np.array([-1, 0]))
    learned = sum(len(made.sample(number).boxes) for number in range(len(made)))
    assert made.objects == learned < whole.objects
    sample = made.sample(ids_of(made)["loose/000.png"])
    assert len(sample.boxes) == 0
    assert sample.ignore.tolist() == [[5, 6, 25, 30]]


def test_a_weight_that_is_no_probability_is_refused() -> None:
    manifest, _, _ = indexed()
    version = read_version(manifest.store)
    for wrong in (np.nan, 1.5, -0.1):
        with pytest.raises(SourceError, match=f"no probability, such as {wrong}"):
            read_label_index(manifest, version, weigh=lambda s, _, w=wrong: np.full(len(s), w))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.delete("loose/002.png"), "1 of 6 objects .* loose/002.png is gone"),
        (lambda s: s.put("tars/0.tar", tar_of(("0.png", b"x"))), "1 of 6 .* tars/0.tar changed"),
    ],
)
def test_shards_gone_or_changed_are_named_before_the_first_step(
    tmp_path: Path, change: Callable[[MemoryStore], object], said: str
) -> None:
    manifest, source, index = indexed()
    images = StreamImages(manifest, source, index, NodeCache(tmp_path, 1 << 20))
    images.check()
    change(source)
    with pytest.raises(SourceError, match=said):
        images.check()


def test_objects_that_were_copied_back_count_where_all_their_images_have_the_same_bytes(
    tmp_path: Path,
) -> None:
    manifest, source, index = indexed()
    before = {o.key: (o.etag, source.get(o.key)) for o in source.list()}
    for key, (_, body) in before.items():
        source.put(key, body)
    # The compressed tar with other bytes, and a longer plain one: the images are the same ones.
    unpacked = gzip.decompress(before["tars/1.tar.gz"][1])
    source.put("tars/1.tar.gz", gzip.compress(unpacked, 1, mtime=7))
    source.put("tars/0.tar", before["tars/0.tar"][1] + bytes(10240))
    assert all(o.etag != before[o.key][0] for o in source.list())
    images = StreamImages(manifest, source, index, NodeCache(tmp_path, 1 << 20))
    images.check()
    for number in range(len(index)):
        digest = hashlib.sha256(images.read(number)).hexdigest()
        assert digest == index.place(number).sha256

    # Other bytes of the same size are a change, and so is a file that grew.
    raw = bytearray(before["loose/003.png"][1])
    raw[-20] ^= 1
    source.put("loose/003.png", bytes(raw))
    source.put("loose/002.png", before["loose/002.png"][1] + b"more")
    members = [(f"{m}.png", png(20 + m if m else 7)) for m in range(3)]
    source.put("tars/1.tar.gz", zipped(tar_of(*members)))
    images = StreamImages(manifest, source, index, NodeCache(tmp_path, 1 << 20))
    said = r"3 of 6 .*: loose/002.png changed; loose/003.png changed; tars/1.tar.gz changed"
    with pytest.raises(SourceError, match=said):
        images.check()


def test_an_outage_while_bytes_are_compared_is_an_outage(tmp_path: Path) -> None:
    manifest, source, index = indexed()
    source.put("loose/003.png", source.get("loose/003.png"))
    away = FaultyStore(source, [fail("get_range", "loose/003.png")])
    images = StreamImages(manifest, away, index, NodeCache(tmp_path, 1 << 20))
    with pytest.raises(StorageUnavailable):
        images.check()


def test_many_objects_are_compared_by_one_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, source, index = indexed()
    counting = FaultyStore(source)
    images = StreamImages(manifest, counting, index, NodeCache(tmp_path, 1 << 20))
    monkeypatch.setattr("storage.labels.objects._HEADS", 3)
    images.check()
    assert counting.calls["head"] == 0
    source.delete("loose/003.png")
    with pytest.raises(SourceError, match=r"loose/003.png is gone"):
        images.check()


def test_a_changed_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    manifest, source, index = indexed()
    images = StreamImages(manifest, source, index, NodeCache(tmp_path, 1 << 20))
    number = next(n for n in range(len(index)) if index.place(n).image_id == "loose/002.png")
    source.put("loose/002.png", b"another")
    with pytest.raises(SourceError, match=r"loose/002.png of memory://"):
        images.read(number)


def test_the_cache_saves_reads_and_heals_a_damaged_copy(tmp_path: Path) -> None:
    manifest, source, index = indexed()
    counting = FaultyStore(source)
    images = StreamImages(manifest, counting, index, NodeCache(tmp_path, 1 << 20))
    tar = next(o for o in source.list("tars/0.tar"))
    images.copy(tar)
    first = [images.read(n) for n in range(len(index))]
    reads = counting.calls["get_range"]
    assert reads == 4, "the loose images; tars come whole"
    assert [images.read(n) for n in range(len(index))] == first
    assert counting.calls["get_range"] == reads
    assert [hashlib.sha256(b).hexdigest() for b in first] == [
        index.place(n).sha256 for n in range(len(index))
    ]
    for path in tmp_path.glob("??/*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert [images.read(n) for n in range(len(index))] == first
    assert counting.calls["get_range"] > reads


def test_a_tar_is_copied_in_the_background_while_its_images_are_read_one_by_one(
    tmp_path: Path,
) -> None:
    manifest, source, index = indexed()
    counting, cache = FaultyStore(source), NodeCache(tmp_path, 1 << 20)
    images = StreamImages(manifest, counting, index, cache)
    number = next(n for n in range(len(index)) if index.place(n).image_id == "tars/0.tar/1.png")
    first = images.read(number)
    assert counting.calls["get_range"] == 1
    deadline = time.monotonic() + patient(60)
    size = len(source.get("tars/0.tar"))
    while size not in {p.stat().st_size for p in tmp_path.glob("??/*") if p.suffix != ".part"}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = counting.calls["get_range"]
    assert images.read(number) == first
    assert counting.calls["get_range"] == before


def test_without_room_for_all_what_pays_most_is_kept(tmp_path: Path) -> None:
    manifest, source, index = indexed()
    sizes = {o.key: o.nbytes for o in source.list()}
    room = sizes["tars/0.tar"] + 3 * max(index.nbytes(n) for n in range(len(index)))
    images = StreamImages(manifest, source, index, NodeCache(tmp_path, room))
    for _ in range(2):
        for number in range(len(index)):
            images.read(number)
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= room


def test_what_other_sources_need_of_the_cache_is_left_to_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, source, index = indexed()
    room = 1 << 20
    alone = StreamImages(manifest, source, index, NodeCache(tmp_path, room))
    numbers = range(len(index))
    packed = [n for n in numbers if index.place(n).image_id.startswith("tars/1.tar.gz")]
    unpacked = sum(index.nbytes(n) for n in packed)
    assert unpacked < alone.needs < room
    assert not caplog.records
    counting = FaultyStore(source)
    beside = StreamImages(manifest, counting, index, NodeCache(tmp_path, room), room - unpacked)
    assert beside.needs == unpacked  # compressed tars cannot be read in another way
    assert not caplog.records
    for _ in range(2):
        for number in numbers:
            beside.read(number)
    assert counting.calls["get_range"] == 2 * (len(numbers) - len(packed))
    StreamImages(manifest, source, index, NodeCache(tmp_path, room), room - unpacked + 1)
    (said,) = (record.getMessage() for record in caplog.records)
    assert f"hold {unpacked:,} bytes of images" in said
    assert f"cache.size has {unpacked - 1:,} left" in said


def test_a_cache_smaller_than_one_shard_and_none_for_a_compressed_tar_are_refused(
    tmp_path: Path,
) -> None:
    manifest, source, index = indexed()
    with pytest.raises(ConfigError, match=r"cache.size is 1,000 bytes, less than the shard tars/"):
        StreamImages(manifest, source, index, NodeCache(tmp_path, 1000))
    with pytest.raises(ConfigError, match="compressed") as caught:
        StreamImages(manifest, source, index, None)
    assert "cache" in str(caught.value.hint)


def test_damaged_parts_are_refused() -> None:
    manifest, _, _ = indexed()
    version = read_version(manifest.store)
    key = version.parts[0].key
    raw = bytearray(manifest.store.get(key))
    raw[len(raw) // 2] ^= 1
    manifest.store.put(key, bytes(raw))
    with pytest.raises(LabelfleetError, match=key):
        read_label_index(manifest, version)

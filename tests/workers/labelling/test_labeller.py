"""ShardLabeller: every image of every shard a row, in order, whatever goes wrong beside it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from storage.errors import (
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    ShardFailed,
    StorageError,
    StorageFull,
    WorkerLost,
)
from storage.records import AnnotationRow, Detections, ImageRecord, Shard, StoredObject
from storage.runs.annotations import RowWriter, ShardFooter, read_footer, read_rows
from storage.runs.manifest import Commit, Manifest, annotation_key
from storage.shards.reading import read_shard
from storage.shards.selecting import group_images, tar_shards
from storage.stores.memory import MemoryStore
from tests.support.ray.brightness import BrightnessDetector, QueueingBrightness
from tests.support.samples.image_samples import encode
from tests.support.samples.synthetic_run import record
from tests.support.samples.tar_samples import tar_of
from workers.images.preprocessing import Tiles
from workers.labelling.labeller import ShardLabeller
from workers.spec import LabellerOptions


def grey(value: int, width: int = 40, height: int = 30) -> bytes:
    return encode(Image.fromarray(np.full((height, width, 3), value, np.uint8)), "PNG")


Device = type[BrightnessDetector]


@pytest.fixture(params=[BrightnessDetector, QueueingBrightness])
def device(request: pytest.FixtureRequest) -> Device:
    """A detector that does its work at once, and one that queues it."""
    return request.param  # type: ignore[no-any-return]  # untyped in pytest


class Bench:
    """A labeller over memory stores, and what it wrote."""

    def __init__(self, detector: BrightnessDetector | None = None, **options: object) -> None:
        self.source, self.output = MemoryStore(), MemoryStore()
        self.manifest = Manifest.create_or_continue(self.output, record(("dark", "bright")))
        self.detector = detector or BrightnessDetector()
        self.tiles: Tiles | None = None
        self.options = LabellerOptions(**{"batch_size": 4, **options})  # type: ignore[arg-type]  # by name

    @contextmanager
    def labeller(self, **replaced: object) -> Iterator[ShardLabeller]:
        parts = {"read": self.read, "commit": self.manifest.commit, **replaced}
        made = ShardLabeller(
            self.detector,
            parts["read"],  # type: ignore[arg-type]  # a test's own callable
            parts["commit"],  # type: ignore[arg-type]  # a test's own callable
            self.manifest.record.identity,
            self.options,
            tiles=self.tiles,
        )
        try:
            yield made
        finally:
            self.detector.gate.set()
            made.close()

    def read(self, shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        return read_shard(self.source, shard, max_image_bytes=1 << 20, abort=abort)

    def tar(self, key: str, *members: tuple[str, bytes]) -> Shard:
        self.source.put(key, tar_of(*members))
        return next(tar_shards([self.source.head(key)]))

    def rows(self, shard: Shard) -> list[tuple[str, str]]:
        found = read_rows(self.output, annotation_key(shard.shard_id))
        return [(row.image_id, row.status) for row in found]


def footer(bench: Bench, shard: Shard) -> ShardFooter:
    return read_footer(bench.output, bench.output.head(annotation_key(shard.shard_id)))


def test_every_member_becomes_a_row_in_the_order_of_the_shard(
    device: type[BrightnessDetector],
) -> None:
    bench = Bench(device(), decode_threads=4)
    members = [(f"{i:03}.png", grey(i)) for i in range(50)]
    members[7] = ("007.png", b"")
    members[20] = ("020.png", grey(1)[:40])
    shard = bench.tar("a.tar", *members)
    with bench.labeller() as labeller:
        commit = labeller.label(shard, "try-1")
    assert commit.won
    wanted = [(f"a.tar/{i:03}.png", "undecodable" if i in (7, 20) else "ok") for i in range(50)]
    assert bench.rows(shard) == wanted
    assert footer(bench, shard).counts["ok"] == 48
    assert footer(bench, shard).counts["undecodable"] == 2
    assert labeller.images_done == 50


def test_boxes_come_back_in_pixels_of_the_upright_image() -> None:
    bench = Bench()
    pixels = np.zeros((200, 400, 3), np.uint8)
    pixels[100:150, 200:300] = 255
    shard = bench.tar("a.tar", ("x.png", encode(Image.fromarray(pixels), "PNG")))
    with bench.labeller() as labeller:
        labeller.label(shard, "try-1")
    (row,) = read_rows(bench.output, annotation_key(shard.shard_id))
    assert (row.width, row.height) == (400, 200)
    np.testing.assert_allclose(row.detections.boxes[0], [200, 100, 300, 150], atol=7)


def test_large_images_go_in_tiles_and_stay_one_row(device: Device) -> None:
    bench = Bench(device(), decode_threads=3)
    bench.tiles = Tiles(64, 0.25, whole=False)
    pixels = np.zeros((150, 300, 3), np.uint8)
    pixels[40:60, 44:84] = 255  # across two tiles of the first row, at 0 and 48
    pixels[130:146, 250:280] = 255
    large = encode(Image.fromarray(pixels), "PNG")
    members = [(f"{i}.png", grey(i)) for i in range(3)]
    shard = bench.tar("a.tar", members[0], ("large.png", large), *members[1:])
    with bench.labeller() as labeller:
        commit = labeller.label(shard, "try-1")
    assert (commit.won, commit.footer.images, commit.footer.counts["ok"]) == (True, 4, 4)
    rows = list(read_rows(bench.output, annotation_key(shard.shard_id)))
    assert [row.image_id for row in rows] == [f"a.tar/{n}.png" for n in ("0", "large", "1", "2")]
    row = rows[1]
    assert (row.width, row.height, row.nbytes) == (300, 150, len(large))
    lit = row.detections.boxes[row.detections.scores > 0]
    for true in ([44, 40, 84, 60], [250, 130, 280, 146]):
        near = np.abs(lit - np.array(true, np.float32)).max(axis=1)
        assert (near <= 1).sum() == 1, (true, lit)  # found, and once


def test_batches_cross_shard_borders(device: Device) -> None:
    bench = Bench(device(), batch_size=6, partial_batch_ms=10_000)
    shards = [bench.tar(f"{i}.tar", (f"{i}.png", grey(i))) for i in range(6)]
    bench.detector.gate.clear()
    read, all_read = list[str](), threading.Event()

    def noted(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        yield from bench.read(shard, abort)
        read.append(shard.key)
        if len(read) == len(shards):
            all_read.set()

    with bench.labeller(read=noted) as labeller, ThreadPoolExecutor(6) as callers:
        results = [callers.submit(labeller.label, s, f"try-{s.key}") for s in shards]
        assert all_read.wait(60)  # one at a time they would come late, each would be a batch
        bench.detector.gate.set()
        assert all(r.result(30).won for r in results)
    assert sum(bench.detector.batches) == 6
    assert max(bench.detector.batches) > 1
    for shard in shards:
        assert len(bench.rows(shard)) == 1


class TwoSteps(BrightnessDetector):
    """Runs in one thread and finishes in others, later than the next batch begins."""

    def __init__(self) -> None:
        super().__init__()
        self.started_in: set[int] = set()
        self.finished_in: set[int] = set()

    def start(self, batch: NDArray[np.uint8]) -> Callable[[], Sequence[Detections]]:
        self.started_in.add(threading.get_ident())
        found = self.detect(batch)

        def finish() -> Sequence[Detections]:
            self.finished_in.add(threading.get_ident())
            time.sleep(0.002)
            return found

        return finish


@pytest.mark.parametrize("threads", [1, 3])
def test_nms_runs_beside_the_network_and_rows_keep_their_order(threads: int) -> None:
    detector = TwoSteps()
    bench = Bench(detector, nms_threads=threads)
    shard = bench.tar("a.tar", *[(f"{i:03}.png", grey(i)) for i in range(60)])
    with bench.labeller() as labeller:
        assert labeller.label(shard, "try").won
    assert bench.rows(shard) == [(f"a.tar/{i:03}.png", "ok") for i in range(60)]
    found = list(read_rows(bench.output, annotation_key(shard.shard_id)))
    scores = [row.detections.scores[0] for row in found]
    assert (np.diff(scores) > 0).all()  # each row has its own image's
    assert len(detector.started_in) == 1
    assert not detector.started_in & detector.finished_in


def test_a_device_gets_its_next_batch_while_it_runs_one() -> None:
    detector = QueueingBrightness(batch_s=0.05)
    bench = Bench(detector, decode_threads=4, partial_batch_ms=600_000)
    shard = bench.tar("a.tar", *[(f"{i:03}.png", grey(i)) for i in range(40)])
    with bench.labeller() as labeller:
        assert labeller.label(shard, "try").won
    waits = [number for what, number in detector.happened if what == "wait"]
    assert waits == list(range(10))  # in order, each once
    under_way = np.cumsum([1 if what == "launch" else -1 for what, _ in detector.happened])
    assert under_way.max() == 2
    found = list(read_rows(bench.output, annotation_key(shard.shard_id)))
    scores = [row.detections.scores[0] for row in found]
    assert (np.diff(scores) > 0).all()  # no slot was overwritten before it was read


def test_seconds_and_fill_are_in_the_footer(device: Device) -> None:
    bench = Bench(device())
    shard = bench.tar("a.tar", *[(f"{i}.png", grey(i)) for i in range(20)])
    with bench.labeller() as labeller:
        commit = labeller.label(shard, "try")
    stages = {"fetch", "decode", "wait", "infer", "nms", "write"}
    assert set(footer(bench, shard).seconds) == stages
    assert set(commit.footer.seconds) == stages | {"commit"}
    assert commit.footer.seconds["decode"] > 0
    assert set(footer(bench, shard).fill) == {"fetched", "decoded"}
    assert all(0 <= share <= 1 for share in footer(bench, shard).fill.values())


def test_a_partial_batch_goes_when_nothing_else_is_queued(device: Device) -> None:
    bench = Bench(device(), batch_size=64, partial_batch_ms=600_000)
    shard = bench.tar("a.tar", ("x.png", grey(1)), ("y.png", grey(2)))
    with bench.labeller() as labeller, ThreadPoolExecutor(1) as caller:
        assert caller.submit(labeller.label, shard, "try").result(30).won


def test_empty_shard_is_a_commit_without_rows() -> None:
    bench = Bench()
    shard = bench.tar("a.tar", ("notes.txt", b"nothing here"))
    with bench.labeller() as labeller:
        assert labeller.label(shard, "try").footer.images == 0
    assert bench.rows(shard) == []


def test_a_poison_image_fails_its_own_shard_only(device: Device) -> None:
    bench = Bench(device(fail_on=77))
    bad = bench.tar("bad.tar", ("a.png", grey(10)), ("p.png", grey(77, 64, 64)))
    good = bench.tar("good.tar", *[(f"{i}.png", grey(i)) for i in range(20)])
    with bench.labeller() as labeller, ThreadPoolExecutor(2) as callers:
        failing = callers.submit(labeller.label, bad, "try-bad")
        fine = callers.submit(labeller.label, good, "try-good")
        with pytest.raises(ShardFailed, match=r"bad\.tar.*'bad.tar/p.png'.*poison"):
            failing.result(30)
        assert fine.result(30).won
        assert labeller.label(good, "again").won is False  # still alive, and told it was late
    assert len(bench.rows(good)) == 20
    assert [o.key for o in bench.output.list("annotations/")] == [annotation_key(good.shard_id)]


def test_an_image_without_a_finite_output_is_a_row_and_the_rest_is_labelled(
    device: Device,
) -> None:
    bench = Bench(device(nan_on=77))
    shard = bench.tar("a.tar", *[(f"{i}.png", grey(75 + i, 64, 64)) for i in range(6)])
    with bench.labeller() as labeller:
        commit = labeller.label(shard, "try")
    assert commit.footer.counts["not_finite"] == 1
    found = list(read_rows(bench.output, annotation_key(shard.shard_id)))
    assert [r.status for r in found] == ["ok", "ok", "not_finite", "ok", "ok", "ok"]
    assert [len(r.detections) for r in found] == [1, 1, 0, 1, 1, 1]
    assert (found[2].width, found[2].height) == (64, 64)
    assert "NaN" in str(found[2].error)


def test_a_tile_without_a_finite_output_sets_its_image_aside_once(device: Device) -> None:
    bench = Bench(device(nan_on=77))
    bench.tiles = Tiles(64, 0.0, whole=False)
    large = np.full((64, 192, 3), 10, np.uint8)
    large[:, :64] = large[:, 128:] = 77  # two of its three tiles
    members = [("a.png", grey(10, 192, 64)), ("b.png", encode(Image.fromarray(large), "PNG"))]
    shard = bench.tar("a.tar", *members, ("c.png", grey(12, 192, 64)))
    with bench.labeller() as labeller:
        assert labeller.label(shard, "try").footer.images == 3
    assert [status for _, status in bench.rows(shard)] == ["ok", "not_finite", "ok"]


def test_the_other_tiles_of_an_image_without_a_finite_output_are_left(device: Device) -> None:
    bench = Bench(device(nan_on=77), decode_threads=1)
    bench.tiles = Tiles(64, 0.0, whole=False)
    shard = bench.tar("a.tar", ("a.png", grey(77, 64 * 40, 64 * 10)), ("b.png", grey(9)))
    with bench.labeller() as labeller:
        labeller.label(shard, "try")
    assert bench.rows(shard) == [("a.tar/a.png", "not_finite"), ("a.tar/b.png", "ok")]
    # Of 400 tiles; each that was tried ran in its batch and alone, and a blank image after them.
    assert sum(bench.detector.batches) < 200


def test_a_broken_device_is_the_workers_fault_not_a_shards(
    device: type[BrightnessDetector],
) -> None:
    bench = Bench(device(fail_always=True))
    shard = bench.tar("a.tar", ("x.png", grey(1)))
    with bench.labeller() as labeller:
        with pytest.raises(WorkerLost, match="device lost"):
            labeller.label(shard, "try-1")
        with pytest.raises(WorkerLost, match="device lost"):
            labeller.label(shard, "try-2")


def test_a_detector_without_memory_for_one_image_blames_no_shard(
    device: type[BrightnessDetector],
) -> None:
    bench = Bench(device(most=0))
    shard = bench.tar("a.tar", ("x.png", grey(1)))
    with bench.labeller() as labeller, pytest.raises(WorkerLost, match="MemoryError"):
        labeller.label(shard, "try")


def test_a_writer_without_memory_blames_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: RowWriter, row: AnnotationRow) -> None:
        raise MemoryError("row group")

    monkeypatch.setattr(RowWriter, "write", write)
    bench = Bench()
    shard = bench.tar("a.tar", ("x.png", grey(1)))
    with bench.labeller() as labeller, pytest.raises(WorkerLost, match="MemoryError"):
        labeller.label(shard, "try")


def test_batches_shrink_until_they_fit_the_device(device: Device) -> None:
    bench = Bench(device(most=3), batch_size=16)
    shard = bench.tar("a.tar", *[(f"{i}.png", grey(i)) for i in range(64)])
    with bench.labeller() as labeller:
        assert labeller.label(shard, "try").footer.counts["ok"] == 64
    assert max(bench.detector.batches) <= 3


def test_a_reader_that_breaks_in_the_middle_fails_the_attempt_and_a_second_one_succeeds() -> None:
    bench = Bench()
    shard = bench.tar("a.tar", *[(f"{i}.png", grey(i)) for i in range(30)])
    tries = iter([True, False])

    def read(wanted: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        fails = next(tries)
        for i, image in enumerate(bench.read(wanted, abort)):
            if fails and i == 20:
                raise ValueError("a bug in a reader")
            yield image

    with bench.labeller(read=read) as labeller:
        with pytest.raises(ShardFailed, match="a bug in a reader"):
            labeller.label(shard, "try-1")
        assert labeller.label(shard, "try-2").won
    assert len(bench.rows(shard)) == 30
    assert labeller.images_done >= 30


def test_a_truncated_tar_commits_what_was_readable_and_says_so() -> None:
    bench = Bench()
    whole = tar_of(*[(f"{i}.png", grey(i)) for i in range(10)])
    bench.source.put("cut.tar", whole[:5000])
    shard = next(tar_shards([bench.source.head("cut.tar")]))
    with bench.labeller() as labeller:
        commit = labeller.label(shard, "try")
    assert 0 < commit.footer.images < 10
    assert commit.footer.source_truncated
    found = footer(bench, shard)
    assert (found.counts, found.source_truncated) == (
        commit.footer.counts, commit.footer.source_truncated,
    )  # fmt: skip


def test_loose_images_that_changed_or_vanished_are_rows() -> None:
    bench = Bench()
    for name in ("a.png", "b.png", "c.png"):
        bench.source.put(name, grey(5))
    listed = list(bench.source.list())
    (shard,) = group_images(listed, 10)
    bench.source.put("a.png", grey(6))
    bench.source.delete("b.png")
    with bench.labeller() as labeller:
        labeller.label(shard, "try")
    assert bench.rows(shard) == [("a.png", "missing"), ("b.png", "missing"), ("c.png", "ok")]


@pytest.mark.parametrize("error", [ObjectNotFound("gone"), ObjectChanged("another one")])
def test_a_tar_that_goes_away_while_it_is_read_leaves_no_partial_commit(
    error: StorageError,
) -> None:
    bench = Bench()
    shard = bench.tar("a.tar", *((f"{i}.png", grey(i)) for i in range(4)))
    attempts = []

    def interrupted(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        attempts.append(shard)
        for index, image in enumerate(bench.read(shard, abort)):
            if index == 2 and len(attempts) == 1:
                raise error
            yield image

    with bench.labeller(read=interrupted) as labeller:
        with pytest.raises(type(error), match=r"a\.tar"):
            labeller.label(shard, "try-1")
        assert bench.manifest.committed() == set()
        assert labeller.label(shard, "try-2").footer.source_truncated is None
    assert bench.rows(shard) == [(f"a.tar/{i}.png", "ok") for i in range(4)]


@pytest.mark.parametrize("fate", ["vanished", "changed"])
def test_a_tar_that_is_not_the_one_listed_is_a_row_that_says_so(fate: str) -> None:
    bench = Bench()
    shard = bench.tar("a.tar", ("x.png", grey(1)))
    if fate == "vanished":
        bench.source.delete("a.tar")
    else:
        bench.source.put("a.tar", tar_of(("y.png", grey(2))))
    with bench.labeller() as labeller:
        commit = labeller.label(shard, "try")
    assert bench.rows(shard) == [("a.tar", "missing")]
    assert commit.footer.source_truncated


def test_the_class_of_a_storage_error_survives_and_its_message_names_the_shard() -> None:
    bench = Bench()
    shard = bench.tar("a.tar", ("x.png", grey(1)))

    def full(footer: ShardFooter, spool: Path) -> Commit:
        raise StorageFull("no space left", hint="free some")

    wanted = pytest.raises(StorageFull, match=r"a\.tar.*no space left")
    with bench.labeller(commit=full) as labeller, wanted as caught:
        labeller.label(shard, "try")
    assert caught.value.hint == "free some"


def test_close_ends_attempts_in_flight() -> None:
    bench = Bench()
    shard = bench.tar("a.tar", *[(f"{i}.png", grey(i)) for i in range(200)])
    bench.detector.gate.clear()
    with bench.labeller() as labeller, ThreadPoolExecutor(1) as caller:
        flying = caller.submit(labeller.label, shard, "try")
        threading.Thread(target=labeller.close, daemon=True).start()
        with pytest.raises(WorkerLost, match="closed"):
            flying.result(30)


def test_an_interrupted_caller_ends_its_reading() -> None:
    """Ctrl-C in a process that labels without Ray."""
    bench, aborted = Bench(), threading.Event()

    def endless(shard: Shard, abort: Callable[[], bool]) -> Iterator[ImageRecord]:
        for number in itertools.count():
            if abort():
                aborted.set()
                return
            if number == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield ImageRecord(f"{number}", None, 4, grey(number % 200))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with bench.labeller(read=endless) as labeller:
            with pytest.raises(KeyboardInterrupt):
                labeller.label(Shard("0" * 16, "images", ()), "try")
            assert aborted.wait(30)
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_spool_file_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bench = Bench()
    shard = bench.tar("a.tar", ("x.png", grey(1)))
    with bench.labeller() as labeller:
        labeller.label(shard, "one")
        (folder,) = tmp_path.iterdir()
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_errors_travel_between_processes_whole() -> None:
    import pickle

    error = StorageFull("no space", hint="free some")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), back.message, back.hint) == (StorageFull, "no space", "free some")
    assert isinstance(back, LabelfleetError)


def test_shards_key_names_it_for_people() -> None:
    objects = tuple(StoredObject(f"{i}.jpg", 1, "e") for i in range(3))
    assert Shard("0" * 16, "images", objects).key == "0.jpg (+2)"


_FIRST_SHARD = """
import sys
from tests.workers.labelling.test_labeller import Bench, grey
bench = Bench()
shard = bench.tar("a.tar", ("1.png", grey(1)), ("2.jpg", b"no image"))
with bench.labeller() as labeller:
    before = set(sys.modules)
    labeller.label(shard, "1")
    print(sorted(set(sys.modules) - before), file=sys.__stdout__, flush=True)
"""


def test_what_the_first_shard_needs_is_imported_before_it() -> None:
    path = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_SHARD],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

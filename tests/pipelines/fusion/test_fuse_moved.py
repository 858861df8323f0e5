"""Fusion of runs whose source was moved: nothing is lost, and a half relocated pair is told so."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import pytest

from pipelines.fusion.fuse import FuseSummary, fuse_runs
from pipelines.fusion.listing_copy import copy_listing
from pipelines.runs.relocate import relocate_run
from pipelines.runs.verify import verify_run
from storage.errors import RunMismatch
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import Shard, StoredObject
from storage.runs.generations import move_key
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.pipelines.runs.test_relocate import filled, label
from tests.support.samples.synthetic_run import image_shard, list_shards, make_run, record, row

OPTIONS = StorageOptions()


class Place:
    """Two labelled runs over one folder, and the folder that it moves to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = open_store(str(filled(folder / "in")))
        self.urls = []
        for name in ("r1", "r2"):
            run = Manifest.create_or_continue(
                open_store(str(folder / name)), record(source=source.url)
            )
            label(run, source)
            self.urls.append(run.url)
        self.output = open_store(str(folder / "fused"))

    def move(self, name: str = "there") -> ObjectStore:
        shutil.copytree(self.folder / "in", self.folder / name, copy_function=shutil.copyfile)
        return open_store(str(self.folder / name))

    def runs(self) -> list[Manifest]:
        return [Manifest.open(url) for url in self.urls]

    def relocate(self, source: ObjectStore) -> None:
        for run in self.runs():
            relocate_run(run, source.url, OPTIONS)

    def fuse(self) -> FuseSummary:
        return fuse_runs(self.runs(), self.output)

    def fused_ids(self) -> list[str]:
        return sorted(row.image_id for row in live_rows(Manifest.open(self.output.url)))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


TEN = [*(f"{name}.jpg" for name in "abcdefg"), "x.tar/1.jpg", "x.tar/2.jpg", "y.tar.gz/3.jpg"]


def test_a_relocated_run_is_fused_whole(place: Place) -> None:
    there = place.move()
    place.relocate(there)
    done = place.fuse()
    assert (done.committed, done.images, done.waiting) == (5, 10, 0)
    assert place.fused_ids() == TEN
    assert Listing(place.output).place() == there.url
    assert verify_run(Manifest.open(place.output.url), source=there, complete=True).exit_code == 0


@pytest.mark.slow
def test_a_fusion_that_was_made_empty_of_a_relocated_run_is_filled(place: Place) -> None:
    place.relocate(place.move())
    place.fuse()
    for key in [o.key for o in place.output.list("annotations/")]:
        place.output.delete(key)
    place.output.delete(move_key(1))  # as the previous version left it
    assert Listing(place.output).count() == 0
    assert place.fuse().committed == 5
    assert place.fused_ids() == TEN


@pytest.mark.slow
def test_an_existing_fusion_is_relocated_first_and_goes_on(place: Place) -> None:
    place.fuse()
    there = place.move()
    place.relocate(there)
    there.put("zz.jpg", b"new")
    for run in place.runs():
        label(run, there)
    kept = sorted(o.key for o in place.output.list())
    with pytest.raises(RunMismatch) as refused:
        place.fuse()
    assert f"labelfleet relocate {place.output.url} {there.url}" in str(refused.value.hint)
    assert sorted(o.key for o in place.output.list()) == kept
    relocate_run(Manifest.open(place.output.url), there.url, OPTIONS)
    done = place.fuse()
    assert (done.committed, done.before) == (1, 5)
    assert place.fused_ids() == [*TEN, "zz.jpg"]


@pytest.mark.slow
def test_the_runs_need_not_have_moved_as_often(place: Place) -> None:
    place.fuse()
    place.relocate(place.move("first"))
    there = place.move("second")
    place.relocate(there)
    relocate_run(Manifest.open(place.output.url), there.url, OPTIONS)
    there.put("zz.jpg", b"new")
    for run in place.runs():
        label(run, there)
    assert place.fuse().committed == 1
    assert place.fused_ids() == [*TEN, "zz.jpg"]


def test_a_listing_of_other_objects_is_refused() -> None:
    first, other = MemoryStore(), MemoryStore()
    list_shards(first, [Shard("aa", "images", (StoredObject("a.jpg", 1, "e1"),))])
    list_shards(other, [Shard("aa", "images", (StoredObject("a.jpg", 1, "e2"),))])
    with pytest.raises(RunMismatch, match="is not that of"):
        copy_listing(first, other, "memory://images")


@pytest.mark.slow
def test_the_memory_of_a_call_does_not_grow_with_the_listing() -> None:
    """200,000 listed objects, which as Python objects take about 50 MB; ids alone are held."""
    labelled = image_shard("a.jpg")
    waiting = [
        image_shard(*(f"{n:05}/{i:03}-{'k' * 60}.jpg" for i in range(200))) for n in range(1000)
    ]
    rows = {labelled: [row("a.jpg", labelled.shard_id)]}
    runs = [
        make_run(MemoryStore(), rows, unlabelled=waiting),
        make_run(MemoryStore(), rows),
    ]
    tracemalloc.start()
    done = fuse_runs(runs, MemoryStore())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (done.committed, done.waiting) == (1, 1000)
    assert peak < 25e6

"""Objects that were copied back: what is read to compare them, and what counts as a change."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from storage.errors import AccessDenied, ShortRead, SourceError, StorageError, StorageUnavailable
from storage.labels import copied
from storage.labels.copied import Comparison, Suspect
from storage.labels.images import StreamImages
from storage.labels.objects import objects_now
from storage.labels.stream import LabelIndex, read_label_index
from storage.labels.versions import read_version
from storage.objects.protocols import ObjectStore
from storage.records import ImageRef, StoredObject
from storage.runs.manifest import Manifest
from storage.shards.node_cache import NodeCache
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.faulty import FaultyStore, Verb, delay, fail
from tests.support.samples.labelled_run import label, png
from tests.support.samples.tar_samples import tar_of, zipped
from tests.support.servers.proxy import Rule, faulty_proxy
from tests.support.servers.s3 import S3Server

IMAGES = 3  # of each tar


def tar(number: int, *, other: int | None = None) -> bytes:
    """A tar of three images, of which one may be another."""
    seeds = [100 * number + m + (50 if m == other else 0) for m in range(IMAGES)]
    return tar_of(*((f"{m}.png", png(seed)) for m, seed in enumerate(seeds)))


def source_of(plain: int = 0, compressed: int = 0) -> tuple[MemoryStore, Manifest, LabelIndex]:
    """Labelled tars of which each was put back with the same bytes, as another version."""
    source = MemoryStore()
    for number in range(plain):
        source.put(f"plain/{number:02}.tar", tar(number))
    for number in range(compressed):
        source.put(f"packed/{number:02}.tar.gz", zipped(tar(number)))
    manifest = label(source, MemoryStore())
    decide_run(manifest, Policy(accept=0.1, reject=0.05))
    before = {one.key: one.etag for one in source.list()}
    for key in before:
        source.put(key, source.get(key))
    assert all(one.etag != before[one.key] for one in source.list())
    index = read_label_index(manifest, read_version(manifest.store))
    assert len(index) == IMAGES * (plain + compressed)
    return source, manifest, index


def images_of(
    source: ObjectStore, manifest: Manifest, index: LabelIndex, folder: Path, room: int = 1 << 24
) -> StreamImages:
    return StreamImages(manifest, source, index, NodeCache(folder, room))


def test_compressed_tars_are_accepted_by_one_reading_each_whatever_the_cache_holds(
    tmp_path: Path,
) -> None:
    source, manifest, index = source_of(compressed=12)
    largest = max(sum(map(index.nbytes, range(n, n + 3))) for n in range(0, len(index), 3))
    counting = FaultyStore(source)
    images = images_of(counting, manifest, index, tmp_path, room=largest * 6 // 5)
    images.check()
    assert counting.calls["stream"] == 12
    assert counting.calls["get_range"] == 0
    kept = sum(path.stat().st_size for path in tmp_path.glob("??/*"))
    assert kept < index.nbytes(0), "nothing was unpacked for it"
    for number in range(len(index)):
        digest = hashlib.sha256(images.read(number)).hexdigest()
        assert digest == index.place(number).sha256


def test_a_replaced_tar_is_read_once_and_named_and_the_others_are_not(tmp_path: Path) -> None:
    source, manifest, index = source_of(plain=2, compressed=3)
    source.put("packed/01.tar.gz", zipped(tar(1, other=0)))
    source.put("packed/02.tar.gz", zipped(tar_of(("0.png", png(200)), ("1.png", png(201)))))
    source.put("plain/01.tar", tar(1, other=2))
    counting = FaultyStore(source)
    said = "3 of 5 .*: packed/01.tar.gz changed; packed/02.tar.gz changed; plain/01.tar changed"
    with pytest.raises(SourceError, match=said):
        images_of(counting, manifest, index, tmp_path).check()
    assert counting.calls["stream"] == 3
    assert counting.calls["get_range"] == 2, "near images come by one request"


def test_what_one_process_found_the_same_is_not_read_by_the_others(tmp_path: Path) -> None:
    source, manifest, index = source_of(plain=2, compressed=1)
    images_of(source, manifest, index, tmp_path).check()
    second = FaultyStore(source)
    images = images_of(second, manifest, index, tmp_path)
    images.check()
    assert second.calls["get_range"] + second.calls["stream"] == 0
    for number in range(len(index)):
        digest = hashlib.sha256(images.read(number)).hexdigest()
        assert digest == index.place(number).sha256
    source.put("plain/01.tar", tar(1, other=0))  # what was found does not cover this version
    for _ in range(2):  # and that something changed is not kept
        third = FaultyStore(source)
        with pytest.raises(SourceError, match=r"1 of 3 .*: plain/01.tar changed"):
            images_of(third, manifest, index, tmp_path).check()
        assert third.calls["get_range"] == 2


def test_processes_that_ask_at_once_read_it_once(tmp_path: Path) -> None:
    source, manifest, index = source_of(plain=1, compressed=1)
    slow = delay("*", seconds=0.2)
    stores = [FaultyStore(source, [slow]) for _ in range(4)]
    together = threading.Barrier(len(stores))

    def check(store: FaultyStore) -> None:
        images = images_of(store, manifest, index, tmp_path)
        together.wait(30)
        images.check()

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(check, stores))
    read = [store.calls["get_range"] + store.calls["stream"] for store in stores]
    assert sorted(read) == [0, 0, 0, 2]


def test_a_cache_that_cannot_be_written_costs_no_more_than_the_note(tmp_path: Path) -> None:
    source, manifest, index = source_of(plain=1)
    (tmp_path / "file").write_bytes(b"")
    images_of(source, manifest, index, tmp_path / "file").check()


def test_a_source_that_is_down_is_not_asked_for_each_object(tmp_path: Path) -> None:
    down = FaultyStore(MemoryStore(), [fail("head", times=None)])
    listed = {f"{n}.png": StoredObject(f"{n}.png", 1, "1") for n in range(1000)}
    with pytest.raises(StorageUnavailable):
        objects_now(down, listed)
    assert down.calls["head"] < 100


def test_a_file_whose_name_is_not_utf_8_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / os.fsdecode(b"\xff.tar.gz")
    file.write_bytes(zipped(tar(0)))
    source = open_store(str(tmp_path / "source"))
    manifest = label(source, MemoryStore())
    decide_run(manifest, Policy(accept=0.1, reject=0.05))
    os.utime(file, (1, 1))
    index = read_label_index(manifest, read_version(manifest.store))
    images = images_of(source, manifest, index, tmp_path / "cache")
    images.check()
    assert [images.read(number) for number in range(IMAGES)] == [png(m) for m in range(IMAGES)]


def test_a_plain_tar_is_not_read_behind_its_first_wrong_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, manifest, index = source_of(plain=1)
    monkeypatch.setattr(copied, "_SPAN", 1)
    counting = FaultyStore(source)
    images_of(counting, manifest, index, tmp_path).check()
    assert counting.calls["get_range"] == IMAGES
    source.put("plain/00.tar", tar(0, other=1))
    with pytest.raises(SourceError, match=r"plain/00.tar changed"):
        images_of(counting, manifest, index, tmp_path).check()
    assert counting.calls["get_range"] == IMAGES + 2


@pytest.mark.parametrize("error", [StorageError, StorageUnavailable, AccessDenied])
@pytest.mark.parametrize(
    ("verb", "key"), [("get_range", "plain/00.tar"), ("stream", "packed/00.tar.gz")]
)
def test_an_object_that_cannot_be_read_is_not_called_changed(
    tmp_path: Path, verb: Verb, key: str, error: type[StorageError]
) -> None:
    source, manifest, index = source_of(plain=1, compressed=1)
    away = FaultyStore(source, [fail(verb, key, error=error)])
    with pytest.raises(error, match=f"{verb} of {key}: injected fault") as caught:
        images_of(away, manifest, index, tmp_path).check()
    assert type(caught.value) is error


def test_an_object_that_ends_early_is_changed(tmp_path: Path) -> None:
    source, manifest, index = source_of(plain=1)
    source.put("plain/00.tar", source.get("plain/00.tar")[:1024])
    counting = FaultyStore(source)
    with pytest.raises(SourceError, match=r"1 of 1 .*: plain/00.tar changed"):
        images_of(counting, manifest, index, tmp_path).check()
    assert counting.calls["get_range"] == 0, "its size says so"


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_replies_that_are_cut_again_and_again_are_no_change(
    kind: str, moto_s3: S3Server, tmp_path: Path
) -> None:
    memory, manifest, index = source_of(plain=kind == "plain", compressed=kind == "packed")
    direct = open_store(f"s3://{moto_s3.fresh_bucket()}", moto_s3.options)
    for one in memory.list():
        direct.put(one.key, memory.get(one.key))
    with faulty_proxy(moto_s3.endpoint_url) as proxy:
        options = replace(moto_s3.options, endpoint_url=proxy.endpoint_url, attempts=2)
        source = open_store(direct.url, options)
        images_of(source, manifest, index, tmp_path / "good").check()
        proxy.rules.append(Rule("cut", "GET", times=None, path_part=kind, keep_bytes=0))
        with pytest.raises(ShortRead, match=f"{kind}/00.tar.*ended early"):
            images_of(source, manifest, index, tmp_path / "cut").check()


def test_an_outage_in_the_middle_is_not_called_a_change(moto_s3: S3Server, tmp_path: Path) -> None:
    memory, manifest, index = source_of(plain=1)
    direct = open_store(f"s3://{moto_s3.fresh_bucket()}", moto_s3.options)
    direct.put("plain/00.tar", memory.get("plain/00.tar"))
    with faulty_proxy(moto_s3.endpoint_url) as proxy:
        options = replace(moto_s3.options, endpoint_url=proxy.endpoint_url, attempts=2)
        images = images_of(open_store(direct.url, options), manifest, index, tmp_path)
        images.check()
        proxy.rules.append(Rule("answer", "GET", times=None, path_part="plain"))
        with pytest.raises(SourceError, match=r"0.png of s3://") as caught:
            images.read(0)
    assert isinstance(caught.value.__cause__, StorageUnavailable)
    assert caught.value.hint == caught.value.__cause__.hint
    direct.put("plain/00.tar", tar(0, other=0))
    images = images_of(direct, manifest, index, tmp_path / "other")
    with pytest.raises(SourceError) as caught:
        images.read(0)
    assert "has it changed since?" in str(caught.value.hint)


def test_the_log_says_what_is_read_and_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, manifest, index = source_of(plain=1, compressed=1)
    nbytes = sum(map(index.nbytes, range(len(index))))
    monkeypatch.setattr(copied, "_EVERY_S", 0.0)
    images_of(source, manifest, index, tmp_path).check()
    first, *others = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"2 objects of {source.url} have another version")
    assert f"{nbytes:,} bytes" in first
    last = f"compared 2 of 2 objects of {source.url}, {nbytes:,} of {nbytes:,} bytes"
    assert last in others


def test_objects_are_taken_a_few_at_a_time() -> None:
    source = MemoryStore()
    source.put("a.png", b"image")
    now = source.head("a.png")
    place = ImageRef("a.png", "0" * 16, 0, 5, hashlib.sha256(b"image").hexdigest())
    taken = 0

    def suspects() -> Iterator[Suspect]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield Suspect(now, now, None, [place])

    results = Comparison(source, 1000, 5000).results(suspects())
    assert next(results) == (now, True)
    assert taken <= 2 * copied._AT_ONCE + 1
    assert list(results) == [(now, True)] * 999

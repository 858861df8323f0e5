"""A source that was moved: the run goes on there with its labels, or is told why it cannot."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config.source import group_shards
from pipelines.runs.relocate import relocate_run
from pipelines.runs.status import run_status
from pipelines.runs.verify import verify_run
from storage.errors import SourceError
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import Shard
from storage.runs.image_bytes import fetch_images
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source
from storage.stores.open import open_store
from tests.support.samples.synthetic_run import commit_rows, record, row
from tests.support.samples.tar_samples import tar_of
from tests.support.servers.s3 import S3Server

OPTIONS = StorageOptions()


def filled(folder: Path) -> Path:
    folder.mkdir()
    for name in "abcdefg":
        (folder / f"{name}.jpg").write_bytes(name.encode() * 9)
    (folder / "x.tar").write_bytes(tar_of(("1.jpg", b"one"), ("2.jpg", b"two")))
    (folder / "y.tar.gz").write_bytes(gzip.compress(tar_of(("3.jpg", b"three"))))
    return folder


def refresh(manifest: Manifest, source: ObjectStore) -> list[Shard]:
    """List again, and return what is to be labelled."""
    listing = Listing(manifest.store)
    listing.refresh(list_source(source), lambda found: group_shards(found, 3))
    committed = manifest.committed()
    return [shard for shard in listing.live_shards() if shard.shard_id not in committed]


def label(manifest: Manifest, source: ObjectStore) -> None:
    for shard in refresh(manifest, source):
        commit_rows(
            manifest,
            shard,
            [
                replace(
                    row(image.image_id, shard.shard_id, offset=image.offset, nbytes=image.nbytes),
                    sha256=hashlib.sha256(image.data or b"").hexdigest(),
                )
                for image in read_shard(source, shard, max_image_bytes=1 << 20)
            ],
        )


@pytest.fixture
def run(tmp_path: Path) -> Manifest:
    """Labelled in two listings, between which an image was changed and one deleted."""
    source = open_store(str(filled(tmp_path / "in")))
    made = record(source=source.url)
    manifest = Manifest.create_or_continue(open_store(str(tmp_path / "run")), made)
    label(manifest, source)
    source.put("b.jpg", b"changed")
    source.delete("c.jpg")
    source.put("bb.jpg", b"new")
    label(manifest, source)
    return manifest


def facts(manifest: Manifest) -> dict[str, tuple[str, str]]:
    return {r.image_id: (r.shard_id, r.sha256) for r in live_rows(manifest)}


def again(manifest: Manifest) -> Manifest:
    return Manifest.open(manifest.url)


def test_a_run_goes_on_where_its_source_was_copied(run: Manifest, tmp_path: Path) -> None:
    before = facts(run)
    shutil.copytree(tmp_path / "in", tmp_path / "there", copy_function=shutil.copyfile)
    there = open_store(str(tmp_path / "there"))
    there.put("later.jpg", b"later")
    done = relocate_run(run, str(tmp_path / "there"), OPTIONS)
    assert (done.objects, done.compared, done.added) == (9, 10, 1)
    manifest = again(run)
    assert manifest.record.source["url"] == there.url
    assert manifest.record.source["moved_from"] == [done.before]
    assert facts(manifest) == before
    shutil.rmtree(tmp_path / "in")
    (new,) = refresh(manifest, there)
    assert [o.key for o in new.objects] == ["later.jpg"]
    label(manifest, there)
    assert facts(manifest).keys() == {*before, "later.jpg"}
    checked = verify_run(manifest, source=there)
    assert checked.differences == []
    assert run_status(manifest).left == 0
    bodies = fetch_images(manifest, there, list(live_rows(manifest)))
    assert all(
        hashlib.sha256(bodies[image_id]).hexdigest() == digest  # type: ignore[arg-type]  # bytes
        for image_id, (_, digest) in facts(manifest).items()
    )
    there.put("a.jpg", b"another one")  # changes are seen as before
    assert [[o.key for o in s.objects] for s in refresh(manifest, there)] == [["a.jpg"]]


@pytest.mark.slow
def test_to_s3_and_back(run: Manifest, tmp_path: Path, moto_s3: S3Server) -> None:
    before = facts(run)
    bucket = moto_s3.fresh_store("images")
    for path in (tmp_path / "in").iterdir():
        bucket.put(path.name, path.read_bytes())
    relocate_run(run, bucket.url, moto_s3.options)
    assert refresh(again(run), bucket) == []
    relocate_run(again(run), str(tmp_path / "in"), OPTIONS)
    assert refresh(again(run), open_store(str(tmp_path / "in"))) == []
    assert facts(again(run)) == before
    assert len(again(run).record.source["moved_from"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "d.jpg").unlink(), r"1 of 9 listed objects are not at .* 'd\.jpg'"),
        (lambda f: (f / "d.jpg").write_bytes(b"d"), "1 of 9 listed objects have another size"),
        (lambda f: (f / "d.jpg").write_bytes(b"x" * 9), r"'d\.jpg' .* not what was labelled"),
        (
            lambda f: (f / "x.tar").write_bytes(tar_of(("1.jpg", b"ONE"), ("2.jpg", b"two"))),
            r"'x\.tar/1\.jpg' .* not what was labelled",
        ),
        (
            lambda f: (f / "y.tar.gz").write_bytes(bytes((f / "y.tar.gz").stat().st_size)),
            r"y\.tar\.gz",
        ),
    ],
)
def test_another_source_is_refused_and_nothing_changes(
    run: Manifest, tmp_path: Path, spoil: object, said: str
) -> None:
    shutil.copytree(tmp_path / "in", tmp_path / "there", copy_function=shutil.copyfile)
    spoil(tmp_path / "there")  # type: ignore[operator]  # a lambda
    kept = sorted(o.key for o in run.store.list())
    with pytest.raises(SourceError, match=said):
        relocate_run(run, str(tmp_path / "there"), OPTIONS)
    assert sorted(o.key for o in run.store.list()) == kept
    assert again(run).record == run.record
    assert refresh(run, open_store(str(tmp_path / "in"))) == []


def test_a_move_that_was_cut_is_finished_by_the_same_command(run: Manifest, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "in", tmp_path / "there", copy_function=shutil.copyfile)
    there = open_store(str(tmp_path / "there"))
    url = run.record.source["url"]
    relocate_run(run, there.url, OPTIONS)
    run.move_source(url)  # as if run.json had not been written
    assert Listing(run.store).place() == there.url != again(run).record.source["url"]
    relocate_run(again(run), there.url, OPTIONS)
    assert again(run).record.source["url"] == there.url
    assert refresh(again(run), there) == []


def test_objects_that_are_copied_again_to_the_same_place_keep_their_labels(
    run: Manifest, tmp_path: Path
) -> None:
    before = facts(run)
    there = open_store(str(shutil.copytree(tmp_path / "in", tmp_path / "there")))
    relocate_run(run, there.url, OPTIONS)
    for path in (tmp_path / "there").iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))
    moved = {o.key: o.etag for o in there.list()}
    relocate_run(again(run), there.url, OPTIONS)
    listing = Listing(run.store)
    assert {o.key: o.etag for s in listing.live_shards() for o in s.objects}.items() >= (
        moved.items()
    )
    assert refresh(again(run), there) == []
    assert facts(again(run)) == before
    kept = sorted(o.key for o in run.store.list())
    relocate_run(again(run), there.url, OPTIONS)  # nothing changed since: nothing is written
    assert sorted(o.key for o in run.store.list()) == kept

"""ingest: every image of a source in one shard, byte for byte, once, whatever interrupts it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.ingest.entries import Entry
from pipelines.ingest.ingest import IngestProgress, Sizes, ingest, pack
from pipelines.ingest.sources import open_source
from storage.errors import ConfigError, NotAtomic, SourceEmpty, StorageError, Undecodable
from storage.objects.protocols import StorageOptions
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source, tar_shards
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.faulty import FaultyStore, drop_reply, fail

OPTIONS = StorageOptions()
LIMIT = 1 << 20


def folder_of(tmp_path: Path, count: int = 23) -> Path:
    folder = tmp_path / "in"
    for number in range(count):
        path = folder / f"part{number % 3}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"image {number} ".encode() * (number * 7 % 50))
    (folder / "notes.txt").write_text("no image")
    return folder


def digests_of_files(folder: Path) -> Counter[str]:
    return Counter(hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.jpg"))


def shards_of(dest: Path | str) -> dict[str, bytes]:
    """Name and body of all images in the shards, as a run would read them."""
    store = open_store(str(dest))
    found: dict[str, bytes] = {}
    for shard in tar_shards(list_source(store)):
        for record in read_shard(store, shard, max_image_bytes=1 << 30):
            assert record.status == "ok"
            assert record.data is not None
            assert record.image_id not in found
            found[record.image_id] = record.data
    return found


def digests_of_shards(dest: Path | str) -> Counter[str]:
    return Counter(hashlib.sha256(body).hexdigest() for body in shards_of(dest).values())


def contents(store: MemoryStore) -> dict[str, bytes]:
    return {listed.key: store.get(listed.key) for listed in store.list()}


def test_a_folder_becomes_shards_byte_for_byte(tmp_path: Path) -> None:
    folder, dest = folder_of(tmp_path), tmp_path / "out"
    told: list[IngestProgress] = []
    summary = ingest(str(folder), str(dest), images_per_shard=5, progress=told.append)
    assert digests_of_shards(dest) == digests_of_files(folder)
    assert sorted(p.name for p in dest.glob("*.tar")) == [f"in-{n:06}.tar" for n in range(5)]
    assert (summary.images, summary.errors, summary.shards, summary.kept) == (23, 0, 5, 0)
    assert summary.errors_url is None
    names = {image_id.partition(".tar/")[2] for image_id in shards_of(dest)}
    assert names == {p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg")}
    assert told[-1].entries == told[-1].total == told[-1].images == 23


def test_a_file_not_named_like_an_image_is_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 2)
    for name in ("a.json", "b.json", "README", "c.tar"):
        (folder / name).write_bytes(b"x")
    counted = {".json": 2, "no suffix": 1, "filtered": 1, ".txt": 1}
    assert ingest(str(folder), str(tmp_path / "out")).left_out == counted
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(path, path.relative_to(folder))
    assert ingest(str(tmp_path / "in.zip"), str(tmp_path / "out2")).left_out == counted
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as file:
        file.writestr("a.json", b"{}")
    with pytest.raises(SourceEmpty, match=r"no images in \S+; there are 1 \.json"):
        ingest(str(tmp_path / "none.zip"), str(tmp_path / "out3"))


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    folder, dest = folder_of(tmp_path), tmp_path / "out"
    (folder / "huge.jpg").write_bytes(b"x" * 30_000)
    ingest(str(folder), str(dest), shard_bytes=10_000)
    sizes = sorted(p.stat().st_size for p in dest.glob("*.tar"))
    assert sizes[-1] > 30_000
    assert all(size <= 10_000 for size in sizes[:-1])
    assert len(sizes) > 3
    assert digests_of_shards(dest) == digests_of_files(folder)


def test_other_programs_read_the_tars_and_same_input_gives_same_bytes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / ("ü" * 60 + ".jpg")).write_bytes(b"long name")
    for dest in ("one", "two"):
        ingest(str(folder), str(tmp_path / dest), images_per_shard=9)
    one = {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.tar")}
    assert one == {p.name: p.read_bytes() for p in (tmp_path / "two").glob("*.tar")}
    for archive in one.values():
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            assert all(m.isfile() and m.mtime == m.uid == m.gid == 0 for m in tar)


def test_a_second_invocation_keeps_everything(tmp_path: Path) -> None:
    folder, dest = folder_of(tmp_path), tmp_path / "out"
    first = ingest(str(folder), str(dest), images_per_shard=5)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in dest.rglob("*") if p.is_file()}
    second = ingest(str(folder), str(dest), images_per_shard=5)
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in dest.rglob("*") if p.is_file()}
    assert before == after
    assert second.kept == second.shards == first.shards
    assert (second.images, second.nbytes) == (first.images, first.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [fail, drop_reply])
def test_an_ingest_that_fails_anywhere_continues_to_the_same_end(
    tmp_path: Path, trouble: Any
) -> None:
    folder = folder_of(tmp_path)
    (folder / "part1" / "link.jpg").symlink_to(folder / "notes.txt")
    source = open_source(str(folder), OPTIONS, max_image_bytes=LIMIT)
    sizes = Sizes(images_per_shard=5)
    whole = MemoryStore()
    expected = pack(source, whole, "in", sizes)
    for verb in ("create", "put", "get", "head"):
        for after in range(40):
            store = MemoryStore()
            broken = FaultyStore(store, [trouble(verb, "in", after=after)])
            try:
                pack(source, broken, "in", sizes)
            except StorageError:
                pass
            else:
                assert contents(store) == contents(whole)
                break
            again = pack(source, store, "in", sizes)
            assert contents(store) == contents(whole), (verb, after)
            assert (again.images, again.errors) == (expected.images, expected.errors)
        else:
            pytest.fail(f"{verb} was still failing after 40 calls: the loop proves nothing")


def test_a_source_that_changed_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    folder, dest = folder_of(tmp_path), tmp_path / "out"
    ingest(str(folder), str(dest), images_per_shard=5)
    before = {p: p.read_bytes() for p in dest.rglob("*") if p.is_file()}
    (folder / "part0" / "new.jpg").write_bytes(b"new")
    with pytest.raises(ConfigError, match=r"another ingest called in: .*entries was 23, is 24"):
        ingest(str(folder), str(dest), images_per_shard=5)
    assert before == {p: p.read_bytes() for p in dest.rglob("*") if p.is_file()}


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    folder, dest = folder_of(tmp_path), tmp_path / "out"
    ingest(str(folder), str(dest), images_per_shard=5)
    with pytest.raises(ConfigError, match="images_per_shard was 5, is 6"):
        ingest(str(folder), str(dest), images_per_shard=6)


def test_what_lies_at_the_destination_is_never_overwritten(tmp_path: Path) -> None:
    folder, dest = folder_of(tmp_path), tmp_path / "out"
    dest.mkdir()
    (dest / "in-000002.tar").write_bytes(b"somebody else's")
    with pytest.raises(ConfigError, match="was not written by this ingest"):
        ingest(str(folder), str(dest), images_per_shard=5)
    assert (dest / "in-000002.tar").read_bytes() == b"somebody else's"


def test_two_sources_share_a_destination_under_their_names(tmp_path: Path) -> None:
    first, second = folder_of(tmp_path), tmp_path / "more"
    second.mkdir()
    (second / "x.jpg").write_bytes(b"x")
    dest = tmp_path / "out"
    ingest(str(first), str(dest))
    ingest(str(second), str(dest))
    assert digests_of_shards(dest) == digests_of_files(first) + digests_of_files(second)


def test_unreadable_entries_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder, dest = folder_of(tmp_path), tmp_path / "out"
    (folder / "link.jpg").symlink_to("/etc/passwd")
    (folder / "big.jpg").write_bytes(bytes(5000))
    (folder / "empty.jpg").write_bytes(b"")
    summary = ingest(str(folder), str(dest), images_per_shard=5, max_image_bytes=4000)
    assert (summary.images, summary.errors) == (24, 2)
    lines = (dest / "in.ingest" / "errors.jsonl").read_text().splitlines()
    errors = {line["name"]: line["error"] for line in map(json.loads, lines)}
    assert set(errors) == {"link.jpg", "big.jpg"}
    assert "symbolic link" in errors["link.jpg"]
    assert "limit is 4000" in errors["big.jpg"]
    assert summary.errors_url == f"{summary.output}/in.ingest/errors.jsonl"


def test_images_that_go_between_two_tries_are_errors_and_come_back_later(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    source = open_source(str(folder), OPTIONS, max_image_bytes=LIMIT)
    store = MemoryStore()
    with pytest.raises(StorageError):
        pack(source, FaultyStore(store, [fail("create", "in-000001.tar")]), "in", Sizes(5))
    listed = list(source.entries())
    gone = {5, 6, 20}  # two of the record without a tar, one of those that have no record

    def missing() -> bytes:
        raise Undecodable("deleted since it was listed")

    class Changed:
        url, readers, left_out = source.url, source.readers, source.left_out
        lost = gone

        def remarks(self) -> list[str]:
            return []

        def entries(self) -> Iterator[Entry]:
            for n, entry in enumerate(listed):
                yield replace(entry, read=missing) if n in self.lost else entry

    changed = Changed()
    second = pack(changed, store, "in", Sizes(5))
    assert (second.images, second.errors, second.exit_code) == (len(listed) - 3, 3, 3)
    third = pack(changed, store, "in", Sizes(5))
    assert (third.images, third.errors, third.shards) == (len(listed) - 3, 3, second.shards)
    changed.lost = {6}
    fourth = pack(changed, store, "in", Sizes(5))
    assert (fourth.images, fourth.errors) == (len(listed) - 1, 1)
    changed.lost = set()
    fifth = pack(changed, store, "in", Sizes(5))
    assert (fifth.images, fifth.errors, fifth.exit_code) == (len(listed), 0, 0)
    assert store.get("in.ingest/errors.jsonl") == b""
    before = contents(store)
    sixth = pack(changed, store, "in", Sizes(5))
    assert contents(store) == before
    assert (sixth.images, sixth.shards, sixth.kept) == (len(listed), fifth.shards, fifth.shards)
    bodies = Counter(
        r.data
        for shard in tar_shards(list_source(store))
        for r in read_shard(store, shard, max_image_bytes=LIMIT)
    )
    assert bodies == Counter(entry.read() for entry in listed)


@pytest.mark.parametrize("where", ["in", "in/below", "."])
def test_a_destination_that_overlaps_the_source_is_refused(tmp_path: Path, where: str) -> None:
    folder_of(tmp_path)
    with pytest.raises(ConfigError, match="overlaps"):
        ingest(str(tmp_path / "in"), str(tmp_path / where))


def test_an_empty_source_and_a_tar_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceEmpty):
        ingest(str(tmp_path / "empty"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="is a tar shard already"):
        ingest(str(tmp_path / "x.tar"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_destination_without_atomic_create_is_refused(tmp_path: Path) -> None:
    class Careless(MemoryStore):
        atomic_create = False

    source = open_source(str(folder_of(tmp_path)), OPTIONS, max_image_bytes=LIMIT)
    with pytest.raises(NotAtomic):
        pack(source, Careless(), "in", Sizes())


def test_the_real_images_pass_through(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "coco_ccby" / "images"
    summary = ingest(str(folder), str(tmp_path), images_per_shard=25)
    assert summary.images == 61
    assert digests_of_shards(tmp_path) == digests_of_files(folder)


def test_a_source_of_which_nothing_could_be_packed_is_no_success(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"too large")
    summary = ingest(str(folder), str(tmp_path / "out"), max_image_bytes=4)
    assert (summary.images, summary.errors, summary.shards, summary.exit_code) == (0, 2, 0, 3)
    assert summary.to_fields()["exit_code"] == 3
    assert shards_of(tmp_path / "out") == {}

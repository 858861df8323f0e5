"""verify: a run as the engine left it is clean, and every damage done to it is named."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines.runs.verification import Verification
from pipelines.runs.verify import verify_run
from pipelines.runs.verify_view import verify_progress, verify_table
from storage.errors import StorageUnavailable
from storage.objects.json_records import json_record
from storage.parquet.files import SealedWriter, metadata_of, opened
from storage.records import Shard
from storage.runs.annotation_check import check_object
from storage.runs.ledger import read_ledger
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest, annotation_key
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from tests.support.faulty import FaultyStore, fail
from tests.support.samples.labelled_run import fill, label, png
from tests.support.samples.synthetic_run import commit_rows, make_run, row, tar_shard
from tests.support.samples.tar_samples import tar_of


class Run:
    """A labelled run and its source: three groups of loose images, two tars."""

    def __init__(self, folder: Path) -> None:
        self.source = LocalStore(str(folder / "in"))
        self.output = LocalStore(str(folder / "out"))
        fill(self.source)
        self.manifest = self.label()

    def label(self) -> Manifest:
        return label(self.source, self.output)

    def shard(self, kind: str, index: int = 0) -> Shard:
        return [s for s in Listing(self.output).live_shards() if s.kind == kind][index]

    def verify(self, **options: object) -> Verification:
        return verify_run(self.manifest, **options)  # type: ignore[arg-type]

    def says(self, **options: object) -> str:
        """The one difference."""
        found = self.verify(**options)
        assert found.exit_code == 1
        (difference,) = found.differences
        return f"{difference.key}: {difference.what}"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_run_as_the_engine_left_it_is_clean(run: Run) -> None:
    found = run.verify(complete=True, source=run.source)
    assert found.differences == []
    assert found.clean
    assert found.exit_code == 0
    rows = list(live_rows(run.manifest))
    assert (found.listed, found.committed, found.left, found.quarantined) == (5, 5, 0, 0)
    assert found.images == len(rows) == 12
    assert found.detections == sum(len(r.detections) for r in rows)
    assert found.nbytes == sum(o.nbytes for o in run.output.list("annotations/"))
    assert found.tars_reread == 2
    assert found.orphans == []


def test_it_writes_nothing(run: Run) -> None:
    before = {o.key: o.etag for o in run.output.list()}
    run.verify(source=run.source)
    assert {o.key: o.etag for o in run.output.list()} == before


def test_a_lost_object_that_the_ledger_saw(run: Run) -> None:
    key = annotation_key(run.shard("images").shard_id)
    run.output.delete(key)
    assert run.says() == f"{key}: the ledger saw it labelled; it is gone"
    assert run.verify().left == 1


def test_what_was_never_labelled_is_left_unless_all_was_asked_for(run: Run) -> None:
    run.source.put("loose/zzz.png", png(77))
    Listing(run.output).refresh(
        run.source.list(), lambda objects: iter([Shard("0" * 16, "images", tuple(objects))])
    )
    assert run.verify().left == 1
    found = run.verify(complete=True)
    assert {d.what for d in found.differences} == {
        "its id is not that of its objects",  # nor is it, in this test
        "not labelled yet: loose/zzz.png",
    }


def test_a_quarantined_shard_is_a_difference_only_where_all_was_asked_for() -> None:
    poison = tar_shard("poison.tar")
    manifest = make_run(MemoryStore(), {}, unlabelled=[poison])
    manifest.set_aside(poison, ["ShardFailed: poison"], "i")
    found = verify_run(manifest)
    assert (found.clean, found.quarantined, found.left) == (True, 1, 0)
    (difference,) = verify_run(manifest, complete=True).differences
    assert difference.what == "quarantined: poison.tar"


# -- objects


def test_a_flipped_bit_in_any_column(run: Run) -> None:
    shard = run.shard("tar")
    key = annotation_key(shard.shard_id)
    raw = run.output.get(key)
    group = pq.ParquetFile(pa.BufferReader(raw)).metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):
        flipped = bytearray(raw)
        start = column.dictionary_page_offset or column.data_page_offset
        flipped[start + column.total_compressed_size - 1] ^= 1
        check = check_object(bytes(flipped), key, shard, run.manifest.record.identity)
        assert "is not a readable Parquet file" in check.problems[0], column.path_in_schema


def test_half_an_object(run: Run) -> None:
    key = annotation_key(run.shard("images").shard_id)
    raw = run.output.get(key)
    run.output.put(key, raw[: len(raw) // 2])
    assert f"{key} is not a readable Parquet file" in run.says()


def test_a_foreign_parquet_file(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    run.output.put(annotation_key(run.shard("images").shard_id), tmp_path / "other.parquet")
    assert "not one that labelfleet wrote" in run.says()


def test_another_shard_s_object_in_its_place(run: Run) -> None:
    one, other = run.shard("images", 0), run.shard("images", 1)
    run.output.put(annotation_key(one.shard_id), run.output.get(annotation_key(other.shard_id)))
    said = {d.what for d in run.verify().differences}
    assert f"its footer is that of shard {other.shard_id}" in said
    assert any(s.startswith("images of the shard that have no row: loose/000.png") for s in said)
    assert any(s.startswith("images that are not of the shard: loose/002.png") for s in said)
    assert f"rows of another shard: {other.shard_id}" in said


def rewritten(run: Run, shard: Shard, change: Callable[[pa.Table], pa.Table]) -> None:
    """Other rows under the same footer, the seal forged as well."""
    key = annotation_key(shard.shard_id)
    with opened(run.output.get(key), key) as file:
        table, footer = change(file.read()), metadata_of(file, key)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forged.parquet"
        writer = SealedWriter(path, table.schema)
        writer.write(table)
        writer.finish(footer)
        run.output.put(key, path)


def test_a_row_too_few(run: Run) -> None:
    rewritten(run, run.shard("tar"), lambda table: table.slice(0, 2))
    said = {d.what for d in run.verify(source=run.source).differences}
    assert "it has 2 ok, its footer says 2 ok, 1 undecodable" in said
    assert "images of the shard that have no row: tars/000.tar/bad.png" in said


def test_a_row_twice(run: Run) -> None:
    rewritten(run, run.shard("images"), lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    said = {d.what for d in run.verify().differences}
    assert "images twice: loose/000.png" in said
    assert "it has 3 ok, its footer says 2 ok" in said


def test_rows_in_another_order(run: Run) -> None:
    rewritten(run, run.shard("images"), lambda table: table.take([1, 0]))
    assert "its rows are not in the order of the shard" in run.says()


def test_a_box_too_few(run: Run) -> None:
    def without_boxes(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("detections")
        none = pa.array([[]] * len(table), table.schema.field(at).type)
        return table.set_column(at, table.schema.field(at), none)

    rewritten(run, run.shard("images"), without_boxes)
    assert "it has 0 boxes, its footer says 2" in {d.what for d in run.verify().differences}


def test_rows_of_another_model(run: Run) -> None:
    body = json.loads(run.output.get("run.json"))
    body["identity"]["model_sha256"] = "ef" * 32
    run.output.put("run.json", json_record(body))
    run.manifest = Manifest.open(run.output.url)
    found = run.verify()
    assert found.found == 5
    assert "written for another run" in found.differences[0].what


def test_a_newer_labelfleet_that_continued_the_run_is_not_a_difference(run: Run) -> None:
    body = json.loads(run.output.get("run.json"))
    body["identity"]["code_version"] = "0.0.9"
    run.output.put("run.json", json_record(body))
    run.manifest = Manifest.open(run.output.url)
    assert run.verify().clean


# -- tars, with the source


def test_a_tar_s_lost_member_shows_only_in_its_tar(tmp_path: Path) -> None:
    store, source = MemoryStore(), MemoryStore()
    etag = source.put("a.tar", tar_of(("1.png", b"1"), ("2.png", b"2")))
    tar = tar_shard("a.tar", source.head("a.tar").nbytes, etag)
    manifest = make_run(store, {tar: [row("a.tar/1.png", tar.shard_id)]})
    assert verify_run(manifest).clean
    said = {difference.what for difference in verify_run(manifest, source=source).differences}
    assert "images of the shard that have no row: a.tar/2.png" in said


def test_a_tar_that_changed_since_says_nothing_about_the_rows(run: Run) -> None:
    run.source.put("tars/000.tar", tar_of(("new.png", png(5))))
    found = run.verify(source=run.source)
    assert found.clean
    assert found.tars_reread == 1


def test_a_tar_that_was_gone_has_one_row_in_its_own_name() -> None:
    tar = tar_shard("gone.tar")
    missing = row("gone.tar", tar.shard_id, status="missing")
    assert verify_run(make_run(MemoryStore(), {tar: [missing]}), source=MemoryStore()).clean


def test_an_image_of_another_tar() -> None:
    tar = tar_shard("a.tar")
    manifest = make_run(MemoryStore(), {tar: [row("b.tar/1.png", tar.shard_id)]})
    (difference,) = verify_run(manifest).differences
    assert difference.what == "images that are not of this tar: b.tar/1.png"


# -- ledger, listing, quarantine, orphans


def test_a_ledger_that_counted_otherwise(run: Run) -> None:
    (part,) = run.output.list("ledger/")
    lines = run.output.get(part.key).decode().splitlines()
    first = json.loads(lines[0])
    first["detections"] += 1
    body = "\n".join([json.dumps(first), *lines[1:-1], ""]).encode()
    seal = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}) + "\n"
    run.output.put(part.key, body + seal.encode())
    assert run.says() == (
        f"{annotation_key(first['shard_id'])}: the ledger counted other rows or boxes"
    )


def test_a_damaged_or_missing_ledger_is_only_a_cache(run: Run) -> None:
    (part,) = run.output.list("ledger/")
    run.output.put(part.key, b'{"event": "shard", "at": 1, "shard_id": "zz"}\n{"eve')
    assert "damaged or edited" in run.says()
    assert len(list(read_ledger(run.output, part.key.split("/")[1]))) == 1
    run.output.delete(part.key)
    assert run.verify().clean


def test_a_hole_in_the_listings(run: Run) -> None:
    run.source.put("loose/new.png", png(9))
    run.label()
    assert run.verify().clean
    run.output.delete("source/0.parquet")
    assert "source/0.parquet is missing" in run.says()


def test_a_damaged_listing(run: Run) -> None:
    raw = run.output.get("source/0.parquet")
    run.output.put("source/0.parquet", raw[: len(raw) // 2])
    assert "source/0.parquet is not a readable Parquet" in run.says()


def test_a_grown_changed_and_shrunk_source_is_clean_and_names_what_is_dead(run: Run) -> None:
    gone = run.shard("tar")
    run.source.delete("tars/000.tar")
    run.source.put("loose/000.png", png(123))
    run.source.put("loose/new.png", png(124))
    run.label()
    found = run.verify(complete=True, source=run.source)
    assert found.differences == []
    (orphan,) = found.orphans
    assert orphan.key == annotation_key(gone.shard_id)
    assert "gc" in orphan.why
    # It comes back as it was after gc: labelled again, and nothing was lost.
    run.output.delete(orphan.key)
    assert run.verify().clean


def test_an_image_that_comes_back_after_its_rows_were_removed_is_left_not_lost(run: Run) -> None:
    tar, raw = run.shard("tar"), run.source.get("tars/000.tar")
    stamp = (Path(run.source.url.removeprefix("file://")) / "tars/000.tar").stat()
    run.source.delete("tars/000.tar")
    run.label()
    run.output.delete(annotation_key(tar.shard_id))
    run.source.put("tars/000.tar", raw)
    import os

    os.utime(
        Path(run.source.url.removeprefix("file://")) / "tars/000.tar",
        ns=(stamp.st_atime_ns, stamp.st_mtime_ns),
    )
    Listing(run.output).refresh(
        run.source.list(), lambda objects: (tar for o in objects if o.key == "tars/000.tar")
    )
    found = run.verify()
    assert found.clean
    assert found.left == 1


def test_an_object_that_no_listing_has(run: Run) -> None:
    stranger = tar_shard("stranger.tar")
    commit_rows(run.manifest, stranger, [row("stranger.tar/1.png", stranger.shard_id)])
    assert "no listing has its shard" in run.says()
    run.output.put("annotations/README", b"hello")
    orphans = run.verify().orphans
    assert {o.key for o in orphans} > {"annotations/README"}
    assert len(orphans) == 2
    assert run.verify().found == 1


def test_quarantine_records(run: Run) -> None:
    shard = run.shard("images")
    run.manifest.set_aside(shard, ["it failed"], "i")
    found = run.verify()
    assert found.clean
    assert "the shard is labelled" in found.remarks[0]
    run.output.put(f"quarantine/{shard.shard_id}.json", b"{")
    assert f"quarantine/{shard.shard_id}.json: cannot be read" in run.says()


# -- how it is told


def test_storage_that_fails_says_nothing_about_the_run(run: Run) -> None:
    broken = FaultyStore(run.output, [fail("get", "annotations/", times=None)])
    with pytest.raises(StorageUnavailable):
        verify_run(Manifest(broken, run.manifest.record))


def test_progress_counts_to_the_end(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    run.verify(progress=lambda done, of: told.append((done, of)))
    assert told == [(i, 5) for i in range(1, 6)]
    with verify_progress() as progress:
        progress(1, 2)


def test_the_view_names_differences_and_escapes_nothing_it_should_not(run: Run) -> None:
    run.output.delete(annotation_key(run.shard("tar").shard_id))
    run.output.put("annotations/[red].txt", b"")
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(verify_table(run.verify()))
    said = console.export_text()
    assert "1 differences" in said
    assert "it is gone" in said
    assert "annotations/[red].txt" in said
    console.print(
        verify_table(Run(Path(run.source.url.removeprefix("file://")).parent / "b").verify())
    )
    assert "clean" in console.export_text()

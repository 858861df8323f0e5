"""gc: what no reader counts goes, when it is old enough; whatever a reader counts stays."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.runs.gc import DAY_S, GcSummary, collect_garbage, garbage_table, parse_age
from pipelines.runs.status import run_status
from pipelines.runs.verify import verify_run
from storage.errors import RunLocked, StorageUnavailable
from storage.labels.versions import claim_version
from storage.objects.protocols import ObjectStore
from storage.review.frames import shard_numbers, write_frame
from storage.runs.live_rows import live_rows
from storage.runs.lock import run_lock
from storage.runs.manifest import Manifest, annotation_key
from storage.stores.local import LocalStore
from storage.stores.memory import MemoryStore
from tests.support.faulty import FaultyStore, fail
from tests.support.samples.labelled_run import fill, label, png
from tests.support.samples.synthetic_run import commit_rows, row, tar_shard


class Run:
    """A run whose source has changed since: one dead tar, one tombstoned image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "out"
        self.source = LocalStore(str(folder / "in"))
        self.output = LocalStore(str(self.folder))
        fill(self.source)
        label(self.source, self.output)
        self.source.delete("tars/000.tar")
        self.source.put("loose/000.png", png(99))
        self.manifest = label(self.source, self.output)

    def age(self, hours: float = 48) -> None:
        """Make everything that is there older."""
        for path in self.folder.rglob("*"):
            then = path.stat().st_mtime - hours * 3600
            os.utime(path, (then, then))

    def files(self) -> set[str]:
        """All files but the locks."""
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        locks = ("lock.json", ".labelfleet-lock")
        return {str(p.relative_to(self.folder)) for p in files if p.name not in locks}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    before = [r.image_id for r in live_rows(made.manifest)]
    yield made
    collect_garbage(made.manifest, older_than_s=0)
    # Whatever a test did: no live row is gone, and the run is whole.
    assert [r.image_id for r in live_rows(made.manifest)] == before
    assert verify_run(made.manifest, complete=True).clean


def whys(summary: GcSummary) -> dict[str, str]:
    return {g.key: g.why for g in summary.garbage}


def litter(run: Run) -> set[str]:
    """One of everything that may lie about; their keys."""
    stranger = tar_shard("stranger.tar")
    commit_rows(run.manifest, stranger, [row("stranger.tar/1.png", stranger.shard_id)])
    live = next(iter(run.manifest.committed() - {stranger.shard_id}))
    run.output.put(f"quarantine/{live}.json", b"{}")
    run.output.put(f"quarantine/{stranger.shard_id}.json", b"{}")
    version = claim_version(run.output, "a writer that died")
    run.output.put(f"labels/{version}/part-000000.parquet", b"half a version")
    frame = write_frame(run.output, shard_numbers([live]))
    image = f"review/images/{'ab' * 32}.jpg"
    run.output.put(image, b"a copy")
    run.output.put(f"writable-{'0' * 16}.probe", b"probe")
    (run.folder / "annotations/.labelfleet-tmp-1-ff").write_bytes(b"half an object")
    return {
        annotation_key(stranger.shard_id),
        f"quarantine/{live}.json",
        f"quarantine/{stranger.shard_id}.json",
        f"labels/{version}/part-000000.parquet",
        frame,
        image,
        f"writable-{'0' * 16}.probe",
        "annotations/.labelfleet-tmp-1-ff",
    }


def dead_tar(run: Run) -> str:
    (key,) = (f"annotations/{i}.parquet" for i in dead_ids(run.manifest))
    return key


def dead_ids(manifest: Manifest) -> set[str]:
    from storage.runs.listing import Listing

    return manifest.committed() - set(Listing(manifest.store).live_ids())


@pytest.mark.slow
def test_it_removes_what_no_reader_counts_and_nothing_else(run: Run) -> None:
    dead = dead_tar(run)
    garbage = litter(run) | {dead}
    before = run.files()
    run.age()
    sizes = {k: (run.folder / k).stat().st_size for k in garbage}
    assert not run_status(run.manifest).plain_glob_exact
    summary = collect_garbage(run.manifest)
    assert set(whys(summary)) == garbage
    assert {g.key: g.nbytes for g in summary.garbage} == sizes
    assert summary.nbytes == sum(sizes.values())
    assert run.files() == before - garbage
    assert run_status(run.manifest).dead_objects == 0
    again = collect_garbage(run.manifest)
    assert (again.garbage, again.young) == ([], 0)


def test_what_is_younger_than_a_day_stays(run: Run) -> None:
    garbage = litter(run)
    run.age(23)
    summary = collect_garbage(run.manifest)
    assert summary.garbage == []
    assert summary.young == len(garbage) + 1
    assert garbage <= run.files()
    assert set(whys(collect_garbage(run.manifest, older_than_s=3600))) > garbage


@pytest.mark.slow
def test_the_rows_of_a_shard_that_was_dropped_stay_for_a_day_after_the_drop(run: Run) -> None:
    run.age()
    dropped = LocalStore(str(run.folder)).head("source/1.parquet").key
    os.utime(run.folder / dropped)  # the drop is new, the rows are old
    found = collect_garbage(run.manifest)
    assert not [g for g in found.garbage if g.why.startswith("rows of a shard")]
    assert found.young == 1
    run.age(25)
    (rows,) = [g for g in collect_garbage(run.manifest).garbage if g.why.startswith("rows")]
    assert rows.key.startswith("annotations/")


def test_zero_leaves_nothing(run: Run) -> None:
    garbage = litter(run)
    summary = collect_garbage(run.manifest, older_than_s=0)
    assert set(whys(summary)) > garbage
    assert not garbage & run.files()


def test_a_dry_run_touches_nothing_not_even_the_lock(run: Run) -> None:
    garbage = litter(run)
    run.age()
    before = run.files()
    with run_lock(run.output, "somebody"):
        summary = collect_garbage(run.manifest, dry_run=True)
    assert set(whys(summary)) > garbage
    assert run.files() == before


def test_it_waits_for_no_run_and_takes_its_lock_from_none(run: Run) -> None:
    run.age()
    with run_lock(run.output, "labelfleet run cells"), pytest.raises(RunLocked, match="run cells"):
        collect_garbage(run.manifest)
    assert dead_tar(run) in run.files()


def test_a_claimed_version_number_is_never_given_again(run: Run) -> None:
    litter(run)
    assert claim_version(run.output, "next") == "v0002"
    collect_garbage(run.manifest, older_than_s=0)
    assert claim_version(run.output, "later") == "v0003"


def test_foreign_objects_stay(run: Run) -> None:
    foreign = {
        "README.md", "annotations/notes.txt", "annotations/0123.parquet", "quarantine/why.txt",
        "labels/mine/a.parquet", "review/images/photo.jpg", "writable-by-me.txt",
    }  # fmt: skip
    for key in foreign:
        run.output.put(key, b"not ours")
    collect_garbage(run.manifest, older_than_s=0)
    assert foreign <= run.files()
    for key in foreign:
        run.output.delete(key)


def test_a_failing_store_leaves_a_run_that_the_next_gc_finishes(run: Run) -> None:
    garbage = litter(run)
    broken = FaultyStore(run.output, [fail("delete", "annotations/", times=1)])
    with pytest.raises(StorageUnavailable):
        collect_garbage(Manifest(broken, run.manifest.record), older_than_s=0)
    collect_garbage(run.manifest, older_than_s=0)
    assert not garbage & run.files()


def test_where_a_store_does_not_say_how_old_objects_are_they_stay() -> None:
    class Ageless(MemoryStore):
        def list(self, prefix: str = "") -> Iterator[object]:  # type: ignore[override]
            from dataclasses import replace

            return (replace(o, modified_at=None) for o in super().list(prefix))

    store: ObjectStore = Ageless()  # type: ignore[assignment]
    source = MemoryStore()
    fill(source, tars=0)
    label(source, store)
    source.delete("loose/000.png")
    source.delete("loose/001.png")
    manifest = label(source, store)
    assert collect_garbage(manifest, older_than_s=1).young == 1
    assert len(collect_garbage(manifest, older_than_s=0).garbage) == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("1d", DAY_S), ("36h", 129_600), ("90m", 5400), ("0", 0), ("1.5h", 5400)]
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "d", "-1d", "1w", "1 day"])
def test_invalid_ages(text: str) -> None:
    with pytest.raises(ValueError, match="12h"):
        parse_age(text)


def test_the_view(run: Run) -> None:
    litter(run)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(garbage_table(collect_garbage(run.manifest, dry_run=True, older_than_s=0)))
    console.print(garbage_table(collect_garbage(run.manifest)))
    said = console.export_text()
    assert "would be removed" in said
    assert "rows of a shard that is not live" in said
    assert "not older than 24 hours" in said

"""The run's record: one identity, one commit a shard, whatever replies get lost."""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from storage.errors import AlreadyExists, ConfigError, NotAtomic, ObjectNotFound, RunMismatch
from storage.objects.protocols import Body
from storage.runs.annotations import RowWriter, ShardFooter
from storage.runs.manifest import Manifest, RunRecord, annotation_key, shard_id_of_key
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.faulty import FaultyStore, stale_list
from tests.support.samples.synthetic_run import (
    commit_rows,
    list_shards,
    make_run,
    record,
    row,
    tar_shard,
)


def spooled(manifest: Manifest, folder: Path, attempt: str, n: int = 1) -> tuple[ShardFooter, Path]:
    shard = tar_shard("a.tar")
    spool = folder / attempt
    writer = RowWriter(spool, manifest.record.identity)
    for i in range(n):
        writer.write(row(f"a.tar/{i}.jpg", shard.shard_id))
    return writer.finish(shard.shard_id, shard.key, attempt), spool


def test_create_then_continue() -> None:
    store = MemoryStore()
    first = Manifest.create_or_continue(store, record())
    later = replace(record(), created_at="2027-01-01T00:00:00+00:00")
    again = Manifest.create_or_continue(store, later)
    assert again.record == first.record == record()
    assert [o.key for o in store.list()] == ["run.json"]


def test_open_gives_what_was_created() -> None:
    store = MemoryStore("open-run", "deep/er")
    Manifest.create_or_continue(store, record(threshold=[1, 2]))
    opened = Manifest.open("memory://open-run/deep/er")
    assert opened.record == record(threshold=[1, 2])
    assert opened.url == "memory://open-run/deep/er"


def test_open_without_a_run_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no run at memory://nothing-here.*\n.*labelfleet run"):
        Manifest.open("memory://nothing-here")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'"x"', b"\xff", b'{"version": 2}', b'{"version": 1, "identity": 3}']
)
def test_a_damaged_run_json_is_an_error_with_words(raw: bytes) -> None:
    store = MemoryStore("damaged")
    store.put("run.json", raw)
    with pytest.raises(ConfigError, match=r"run\.json"):
        Manifest.open("memory://damaged")
    with pytest.raises(ConfigError, match=r"run\.json"):
        Manifest.create_or_continue(store, record())


@pytest.mark.parametrize("artefact", [3, "url", ["url"], {}, {"key": 1}, {"url": "u"}, {"url": 1}])
def test_a_recorded_artefact_of_another_form_is_an_error_with_words(artefact: object) -> None:
    with pytest.raises(ConfigError, match=r"run\.json cannot be read: inference\.artefact"):
        RunRecord.from_json(record(artefact=artefact).to_json())


def test_another_inference_config_is_refused_and_named() -> None:
    store = MemoryStore()
    Manifest.create_or_continue(store, record(preprocessing={"size": (640, 640), "pad": 114}))
    before = {o.key: o.etag for o in store.list()}
    wanted = record(preprocessing={"size": (320, 320), "pad": 114}, nms_iou=0.6)
    with pytest.raises(RunMismatch) as refused:
        Manifest.create_or_continue(store, wanted)
    text = str(refused.value)
    assert "preprocessing.size ([640, 640] there, [320, 320] now)" in text
    assert "nms_iou (0.7 there, 0.6 now)" in text
    assert "pad" not in text
    assert "score_floor" not in text
    assert "another `output`" in text
    assert {o.key: o.etag for o in store.list()} == before


def test_a_setting_that_an_older_version_did_not_know_matters_once_it_is_set() -> None:
    store = MemoryStore()
    Manifest.create_or_continue(store, record())
    Manifest.create_or_continue(store, record(keep=None))
    with pytest.raises(RunMismatch, match=r"keep \(None there, \[1\] now\)"):
        Manifest.create_or_continue(store, record(keep=[1]))


def test_tuples_equal_the_lists_they_become() -> None:
    store = MemoryStore()
    Manifest.create_or_continue(store, record(size=(640, 640)))
    Manifest.create_or_continue(store, record(size=(640, 640)))


def test_another_source_is_refused() -> None:
    store = MemoryStore()
    Manifest.create_or_continue(store, record(source="s3://a/x"))
    with pytest.raises(RunMismatch, match=r"source\.url .*s3://a/x.*s3://b/x") as moved:
        Manifest.create_or_continue(store, record(source="s3://b/x"))
    assert f"`labelfleet relocate {store.url} s3://b/x`" in str(moved.value.hint)
    with pytest.raises(RunMismatch, match=r"source\.url .*; keep ") as another:
        Manifest.create_or_continue(store, record(source="s3://b/x", keep=[1]))
    assert "relocate" not in str(another.value.hint)


def test_other_classes_are_refused() -> None:
    store = MemoryStore()
    Manifest.create_or_continue(store, record(("RBC", "WBC")))
    with pytest.raises(RunMismatch, match=r"classes .*WBC.*Platelets"):
        Manifest.create_or_continue(store, record(("RBC", "Platelets")))


def test_a_store_without_atomic_create_is_refused_untouched() -> None:
    class Careless(MemoryStore):
        atomic_create = False

    store = Careless()
    with pytest.raises(NotAtomic):
        Manifest.create_or_continue(store, record())
    assert list(store.list()) == []


def test_commit_once(tmp_path: Path) -> None:
    manifest = Manifest.create_or_continue(MemoryStore(), record())
    mine = manifest.commit(*spooled(manifest, tmp_path, "mine", 2))
    theirs = manifest.commit(*spooled(manifest, tmp_path, "theirs", 1))
    assert mine.won
    assert not theirs.won
    assert theirs.footer.attempt == "mine"
    assert manifest.footer(mine.shard_id).images == 2
    assert manifest.committed() == {mine.shard_id}


def test_of_many_writers_one_wins(tmp_path: Path) -> None:
    manifest = Manifest.create_or_continue(MemoryStore(), record())
    attempts = [spooled(manifest, tmp_path, f"a{i}") for i in range(8)]
    outcomes = []
    go = threading.Barrier(8)

    def work(footer: ShardFooter, spool: Path) -> None:
        go.wait()
        outcomes.append(manifest.commit(footer, spool))

    threads = [threading.Thread(target=work, args=a) for a in attempts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sum(c.won for c in outcomes) == 1
    winner = next(c.footer.attempt for c in outcomes if c.won)
    assert {c.footer.attempt for c in outcomes} == {winner}


class LostReplies(MemoryStore):
    """Creates the object, then reports it as another's: the lost reply of a retried put."""

    def create(self, key: str, body: Body) -> str:
        super().create(key, body)
        if key.startswith("annotations/"):
            raise AlreadyExists(f"{key} exists already")
        return "etag"


def test_a_lost_reply_is_our_own_win(tmp_path: Path) -> None:
    manifest = Manifest.create_or_continue(LostReplies(), record())
    assert manifest.commit(*spooled(manifest, tmp_path, "mine")).won
    assert not manifest.commit(*spooled(manifest, tmp_path, "theirs")).won


def test_a_stale_listing_of_commits_doubles_nothing(tmp_path: Path) -> None:
    store = FaultyStore(MemoryStore(), [stale_list("annotations/", times=16)])  # once by each digit
    manifest = Manifest.create_or_continue(store, record())
    first = manifest.commit(*spooled(manifest, tmp_path, "first", 2))
    assert manifest.committed() == set()  # so a driver labels the shard once more
    again = manifest.commit(*spooled(manifest, tmp_path, "again", 1))
    assert (again.won, again.footer.attempt) == (False, "first")
    assert manifest.committed() == {first.shard_id}
    assert manifest.footer(first.shard_id).images == 2


def test_committed_ignores_what_is_not_an_annotation_object() -> None:
    shard = tar_shard("a.tar")
    manifest = make_run(MemoryStore(), {shard: [row("a.tar/0.jpg", shard.shard_id)]})
    manifest.store.put("annotations/README.md", b"hello")
    manifest.store.put(f"annotations/{shard.shard_id}.parquet.tmp", b"")
    assert manifest.committed() == {shard.shard_id}
    assert shard_id_of_key(annotation_key(shard.shard_id)) == shard.shard_id


def test_committed_finds_all_shards_once() -> None:
    shards = [tar_shard(f"{i}.tar") for i in range(60)]
    manifest = make_run(MemoryStore(), {s: [] for s in shards})
    objects = [o.key for o in manifest.annotation_objects()]
    assert objects == sorted(annotation_key(s.shard_id) for s in shards)


def test_footer_of_a_shard_that_is_not_committed() -> None:
    manifest = Manifest.create_or_continue(MemoryStore(), record())
    with pytest.raises(ObjectNotFound):
        manifest.footer("0" * 16)


def test_quarantine_and_release() -> None:
    manifest = Manifest.create_or_continue(MemoryStore(), record())
    shard = tar_shard("bad \udcff.tar")
    assert manifest.quarantined() == {}
    manifest.set_aside(shard, ["ShardFailed: first", "WorkerLost: second"], "inv-1")
    manifest.set_aside(shard, ["ShardFailed: third"], "inv-2")
    (aside,) = manifest.quarantined().values()
    assert aside["errors"] == ["ShardFailed: third"]
    assert aside["objects"][0]["nbytes"] == shard.nbytes
    manifest.release(shard.shard_id)
    manifest.release(shard.shard_id)
    assert manifest.quarantined() == {}


def test_a_manifest_can_be_sent_to_another_process(tmp_path: Path) -> None:
    manifest = Manifest.create_or_continue(open_store(str(tmp_path / "run")), record())
    list_shards(manifest.store, [tar_shard("a.tar")])
    commit_rows(manifest, tar_shard("a.tar"), [])
    sent = pickle.loads(pickle.dumps(manifest))
    assert sent.committed() == manifest.committed() != set()

"""Live rows: every live image that was labelled, once, and nothing that was tombstoned."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.records import image_id_of, image_ids_of, printable
from storage.runs.live_rows import live_rows, live_tables
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import (
    commit_rows,
    image_shard,
    list_shards,
    make_run,
    random_boxes,
    record,
    row,
    tar_shard,
)


def ids(manifest: Manifest) -> list[str]:
    return [r.image_id for r in live_rows(manifest)]


def test_all_rows_of_committed_shards_in_listing_order() -> None:
    a, b = tar_shard("a.tar"), image_shard("b/1.jpg", "b/2.jpg")
    rng = np.random.default_rng(0)
    labelled = {
        a: [row(f"a.tar/{i}.jpg", a.shard_id, random_boxes(rng, i, 640, 480)) for i in range(3)],
        b: [row("b/1.jpg", b.shard_id), row("b/2.jpg", b.shard_id, status="undecodable")],
    }
    manifest = make_run(MemoryStore(), labelled, unlabelled=[tar_shard("z.tar")])
    assert ids(manifest) == ["a.tar/0.jpg", "a.tar/1.jpg", "a.tar/2.jpg", "b/1.jpg", "b/2.jpg"]
    assert [len(r.detections) for r in live_rows(manifest)] == [0, 1, 2, 0, 0]


def test_a_run_without_a_commit_has_no_rows() -> None:
    assert ids(make_run(MemoryStore(), {}, unlabelled=[tar_shard("a.tar")])) == []
    assert ids(Manifest.create_or_continue(MemoryStore(), record())) == []


def test_an_object_of_an_unlisted_shard_is_not_live() -> None:
    a, stray = tar_shard("a.tar"), tar_shard("stray.tar")
    manifest = make_run(MemoryStore(), {a: [row("a.tar/0.jpg", a.shard_id)]})
    commit_rows(manifest, stray, [row("stray.tar/0.jpg", stray.shard_id)])
    assert ids(manifest) == ["a.tar/0.jpg"]


def test_changed_and_deleted_images_are_left_out() -> None:
    names = ["a.jpg", "b.jpg", "c.jpg", "bad\udcff.jpg"]
    first = image_shard(*names)
    rows = [row(printable(name), first.shard_id) for name in sorted(names)]
    manifest = make_run(MemoryStore(), {first: rows})
    changed = image_shard("b.jpg", etag="2")
    kept = image_shard("a.jpg")  # as in the first shard: it stays there
    list_shards(manifest.store, [kept, changed])
    assert ids(manifest) == ["a.jpg"]
    commit_rows(manifest, changed, [row("b.jpg", changed.shard_id)])
    assert ids(manifest) == ["a.jpg", "b.jpg"]
    assert [r.shard_id for r in live_rows(manifest)] == [first.shard_id, changed.shard_id]


def test_a_tar_that_changed_leaves_with_all_its_rows() -> None:
    old, new = tar_shard("a.tar"), tar_shard("a.tar", etag="2")
    manifest = make_run(MemoryStore(), {old: [row("a.tar/0.jpg", old.shard_id)]})
    list_shards(manifest.store, [new])
    assert ids(manifest) == []
    commit_rows(manifest, new, [row("a.tar/1.jpg", new.shard_id)])
    assert ids(manifest) == ["a.tar/1.jpg"]


def test_columns_and_shards_can_be_chosen() -> None:
    a, b = image_shard("a.jpg", "gone.jpg"), tar_shard("b.tar")
    manifest = make_run(
        MemoryStore(),
        {
            a: [row("a.jpg", a.shard_id), row("gone.jpg", a.shard_id)],
            b: [row("b.tar/0.jpg", b.shard_id)],
        },
    )
    list_shards(manifest.store, [image_shard("a.jpg"), b])
    tables = list(live_tables(manifest, ["status", "width"], only={a.shard_id}))
    assert [(shard_id, t.column_names, t.num_rows) for shard_id, t in tables] == [
        (a.shard_id, ["status", "width"], 1)
    ]


def test_rows_under_the_ids_of_an_older_version_leave_with_their_images() -> None:
    names = ["in.tar/a.jpg", r"\xff.jpg", "b.jpg"]
    shard = image_shard(*names)
    manifest = make_run(MemoryStore(), {shard: [row(name, shard.shard_id) for name in names]})
    list_shards(manifest.store, [image_shard("b.jpg")])
    assert ids(manifest) == ["b.jpg"]


def test_one_of_two_names_that_an_older_version_took_for_one_stays() -> None:
    names = [r"\xff.jpg", "\udcff.jpg"]
    shard = image_shard(*names)
    rows = [row(image_id_of(name), shard.shard_id) for name in names]
    manifest = make_run(MemoryStore(), {shard: rows})
    list_shards(manifest.store, [image_shard("\udcff.jpg")])
    assert ids(manifest) == [r"\xff.jpg"]


PIECES = st.sampled_from([b"\\", b"x", b"f", b"5", b"c", b"\xff", "é".encode()])
NAMES = st.lists(PIECES, max_size=9).map(b"".join)


@given(NAMES, NAMES)
def test_ids_differ_where_names_differ(one: bytes, other: bytes) -> None:
    assert (printable(one) == printable(other)) == (one == other)
    for name in (one, other):
        assert printable(name.decode("utf-8", "surrogateescape")) == printable(name)


def test_ids_of_ordinary_names_are_their_keys() -> None:
    for key in ("a/b.jpg", "ü 日本.jpg", r"c:\photos\x.jpg", "a.tar.jpg", "my.target/a.jpg"):
        assert image_ids_of(key) == (key,)


def test_printable_keys() -> None:
    assert printable("pages/ü 日本.jpg") == "pages/ü 日本.jpg"
    assert printable("a\udcff.jpg") == "a\\xff.jpg"

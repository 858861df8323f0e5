"""Frames as images of their own: unique ids, and digests that name the frame."""

from __future__ import annotations

import hashlib
import io
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from storage.records import ImageRecord, ImageRef, Shard, image_id_of, shard_id_of
from storage.shards.frames import (
    Frames,
    Wanted,
    as_labelled,
    file_id,
    frame_bytes,
    split_frame,
)
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source, tar_shards
from storage.stores.memory import MemoryStore
from tests.support.samples.tar_samples import tar_of

BY_SIZE = Frames(len, 5)  # a file of n bytes has n frames


def read(store: MemoryStore, frames: Frames | None = BY_SIZE) -> list[ImageRecord]:
    objects = tuple(list_source(store, sniff=lambda listed: True))
    shards = [Shard(shard_id_of(objects), "images", objects)]
    if any(o.key.endswith((".tar", ".tgz")) for o in objects):
        shards = list(tar_shards(objects))
    return [
        record
        for shard in shards
        for record in read_shard(store, shard, max_image_bytes=1 << 20, frames=frames)
    ]


def test_the_first_frame_keeps_the_name_and_the_others_are_numbered() -> None:
    store = MemoryStore()
    store.put("a.tif", b"123")
    store.put("b.png", b"1")
    first, second, third, alone = read(store)
    assert [r.image_id for r in (first, second, third, alone)] == [
        "a.tif", "a.tif#2", "a.tif#3", "b.png",
    ]  # fmt: skip
    assert first.data == b"123"
    assert split_frame(second.data or b"") == (b"123", 2)
    assert split_frame(third.data or b"") == (b"123", 3)
    assert {r.nbytes for r in (first, second, third)} == {3}
    assert [r.image_id for r in read(store, None)] == ["a.tif", "b.png"]


def test_frames_beyond_the_cap_are_one_row_that_counts_them() -> None:
    store = MemoryStore()
    store.put("a.gif", b"1234567")
    *labelled, rest = read(store)
    assert [r.image_id for r in labelled] == ["a.gif", *(f"a.gif#{n}" for n in range(2, 6))]
    assert (rest.image_id, rest.status) == ("a.gif#6", "too_large")
    assert rest.error == "7 frames; this run takes up to 5 of a file"


def test_a_file_that_is_called_like_a_frame_has_another_id() -> None:
    store = MemoryStore()
    store.put("b", b"123")
    store.put("b#2", b"12")
    store.put("b#2#1", b"1")
    assert [r.image_id for r in read(store)] == [
        "b", "b#2", "b#3", "b#2#1", "b#2#1#2", "b#2#1#1",
    ]  # fmt: skip


def test_repeated_members_and_frames_share_one_count() -> None:
    store = MemoryStore()
    store.put("t.tar", tar_of(("a.tif", b"12"), ("a.tif", b"345"), ("b.tif", b"6")))
    assert [r.image_id for r in read(store)] == [
        "t.tar/a.tif", "t.tar/a.tif#2", "t.tar/a.tif#3", "t.tar/a.tif#4", "t.tar/a.tif#5",
        "t.tar/b.tif",
    ]  # fmt: skip


names = st.text("ab#12/", min_size=1, max_size=6).filter(
    lambda key: not key.startswith("/") and not key.endswith("/") and "//" not in key
)


keys_of_files = st.builds(str.__add__, st.sampled_from(["t.tar/", "u/", ""]), names)


@given(st.lists(keys_of_files, min_size=1, max_size=8, unique=True))
def test_no_two_frames_of_any_files_share_an_id(keys: list[str]) -> None:
    ids = [
        image_id
        for key in keys
        for image_id in (image_id_of(key), *(f"{image_id_of(key)}#{n}" for n in range(2, 25)))
    ]
    members = [f"t.tar/{name}" for name in ("a.png", "a.png#2", "b.png")]
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(members)


@given(st.binary(max_size=40), st.integers(1, 9))
def test_a_digest_tells_which_frame_was_labelled(data: bytes, number: int) -> None:
    framed = frame_bytes(data, number)
    digest = hashlib.sha256(framed).hexdigest()
    assert as_labelled(data, "x.tif#9", digest) == framed
    assert split_frame(framed) == (data, number)
    assert as_labelled(data, "x.tif#9", "ab" * 32) == data


def test_ids_of_files() -> None:
    assert file_id("a.tif#12") == "a.tif"
    assert file_id("a.tif") == "a.tif"
    assert file_id("t.tar/a.tif#1#2") == "t.tar/a.tif#1"
    assert file_id("b#2#1") == "b#2#1"
    assert file_id("p.tar/t.tar/a.tif#2#1", "tar") == "p.tar/t.tar/a.tif#1"


def test_frames_are_found_again_in_a_compressed_tar() -> None:
    store = MemoryStore()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, body in (("a.tif", b"12"), ("a.tif", b"345"), ("b.tif", b"6")):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    store.put("t.tgz", file.getvalue())
    labelled = {
        r.image_id: ImageRef(
            r.image_id, "s", None, r.nbytes, hashlib.sha256(r.data or b"").hexdigest()
        )
        for r in read(store)
    }
    wanted = Wanted(labelled[name] for name in ("t.tgz/a.tif#2", "t.tgz/a.tif#5", "t.tgz/b.tif"))
    found = {
        place.image_id: split_frame(data)
        for record in read(store, None)
        for place, data in wanted.of(record)
    }
    assert found == {
        "t.tgz/a.tif#2": (b"12", 2), "t.tgz/a.tif#5": (b"345", 3), "t.tgz/b.tif": (b"6", 1),
    }  # fmt: skip
    assert not wanted.left

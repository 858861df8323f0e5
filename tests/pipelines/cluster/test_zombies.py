"""A run that was thought dead and commits late changes nothing that a reader sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config.source import group_shards
from pipelines.runs.status import run_status
from storage.records import AnnotationRow, Shard, StoredObject
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import commit_rows, record, row

KEYS = [f"{name}.jpg" for name in "abcdefg"]
SHARD_SIZE = 3


class World:
    """A source that changes, a run over it, and drivers that label what they were given once.

    A row's ``nbytes`` is the version of the image it was made of.
    """

    def __init__(self) -> None:
        self.source: dict[str, int] = {}
        self.versions = 0
        self.manifest = Manifest.create_or_continue(MemoryStore(), record())

    def change(self, key: str) -> None:
        """Add the image, or change it: a version that was never there before."""
        self.versions += 1
        self.source[key] = self.versions

    def delete(self, key: str) -> None:
        self.source.pop(key, None)

    def refresh(self) -> None:
        """A new invocation lists the source."""
        listed = [StoredObject(k, 10, f"v{v}") for k, v in sorted(self.source.items())]
        Listing(self.manifest.store).refresh(listed, lambda o: group_shards(o, SHARD_SIZE))

    def label(self, shard: Shard, attempt: str) -> None:
        """What a worker does, whoever sent it: reads with If-Match, and commits."""
        commit_rows(self.manifest, shard, list(self.rows(shard)), attempt=attempt)

    def rows(self, shard: Shard) -> Iterator[AnnotationRow]:
        for listed in shard.objects:
            version = int(listed.etag[1:])
            same = self.source.get(listed.key) == version
            status = "ok" if same else "missing"
            yield row(listed.key, shard.shard_id, status=status, nbytes=version)

    def finish(self) -> None:
        """The living invocation labels everything that is left."""
        committed = self.manifest.committed()
        for shard in list(Listing(self.manifest.store).live_shards(skip=committed)):
            self.label(shard, "alive")

    def seen(self) -> dict[str, tuple[str, int]]:
        """What every reader of ours sees: status and version by image, each image once."""
        found: dict[str, tuple[str, int]] = {}
        for one in live_rows(self.manifest):
            assert one.image_id not in found, f"{one.image_id} twice"
            found[one.image_id] = (one.status, one.nbytes)
        return found

    def wanted(self) -> dict[str, tuple[str, int]]:
        return {key: ("ok", version) for key, version in self.source.items()}

    def zombie(self, number: int) -> None:
        """A process that holds a shard of any earlier listing comes back to life."""
        shards = list(Listing(self.manifest.store).all_shards())
        if shards:
            self.label(shards[number % len(shards)], f"zombie-{number}")


steps = st.lists(
    st.tuples(
        st.sampled_from(["change", "change", "delete", "list", "label", "zombie", "zombie"]),
        st.sampled_from(KEYS),
        st.integers(0, 50),
    ),
    max_size=25,
)


@pytest.mark.slow
@settings(max_examples=30)
@given(steps)
def test_whatever_zombies_commit_and_when_every_image_is_there_once_as_it_is_now(
    taken: list[tuple[str, str, int]],
) -> None:
    world = World()
    for step, key, number in taken:
        if step == "change":
            world.change(key)
        elif step == "delete":
            world.delete(key)
        elif step == "zombie":
            world.zombie(number)
        else:
            world.refresh()
            if step == "label":
                world.finish()
                assert world.seen() == world.wanted()
    world.refresh()
    world.finish()
    before = world.seen()
    assert before == world.wanted()
    counted = run_status(world.manifest)
    for number in range(len(KEYS) * 3):  # and once more, each of them, when all is done
        world.zombie(number)
    assert world.seen() == before
    after = run_status(world.manifest)
    assert (after.images, after.committed, after.left) == (
        counted.images, counted.committed, counted.left,
    )  # fmt: skip


def test_a_zombie_of_a_shard_that_was_labelled_meanwhile_loses() -> None:
    world = World()
    world.change("a.jpg")
    world.refresh()
    [shard] = Listing(world.manifest.store).live_shards()
    world.finish()
    world.label(shard, "zombie")
    assert world.manifest.footer(shard.shard_id).attempt == "alive"


def test_a_zombie_of_a_shard_that_is_no_longer_live_is_garbage_and_counted_as_such() -> None:
    world = World()
    world.change("a.jpg")
    world.refresh()
    [old] = Listing(world.manifest.store).live_shards()
    world.change("a.jpg")
    world.refresh()
    world.finish()
    world.label(old, "zombie")
    assert world.seen() == world.wanted()
    assert run_status(world.manifest).dead_objects == 1

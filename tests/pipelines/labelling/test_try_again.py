"""An image that was missing and can be read again is labelled by a later run, once."""

from __future__ import annotations

from pipelines.labelling.try_again import readable_again
from pipelines.runs.status import run_status
from storage.errors import AccessDenied
from storage.records import Shard
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.shards.selecting import group_images
from storage.stores.memory import MemoryStore
from tests.support.samples.synthetic_run import commit_rows, record, row

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


class Source(MemoryStore):
    """Some of its objects cannot be read."""

    denied: frozenset[str] = frozenset()

    def stream(self, key, *, if_match=None):  # type: ignore[no-untyped-def]  # as in MemoryStore
        if key in self.denied:
            raise AccessDenied(f"{key}: not allowed")
        return super().stream(key, if_match=if_match)


def listed_run(source: Source, missing: set[str]) -> tuple[Manifest, list[Shard]]:
    """Groups of two, labelled but for ``missing``."""
    for name in NAMES:
        source.put(name, name.encode())
    manifest = Manifest.create_or_continue(MemoryStore(), record())
    shards = refresh(manifest, source)
    for shard in shards:
        label(manifest, shard, missing)
    return manifest, shards


def refresh(manifest: Manifest, source: Source, again: frozenset[str] = frozenset()) -> list[Shard]:
    listing = Listing(manifest.store)
    listing.refresh(source.list(), lambda found: group_images(found, 2), again=again)
    committed = manifest.committed()
    return [s for s in listing.live_shards() if s.shard_id not in committed]


def label(manifest: Manifest, shard: Shard, missing: set[str]) -> None:
    commit_rows(
        manifest,
        shard,
        (
            row(o.key, shard.shard_id, status="missing" if o.key in missing else "ok")
            for o in shard.objects
        ),
    )


def statuses(manifest: Manifest) -> dict[str, str]:
    rows = list(live_rows(manifest))
    assert len({r.image_id for r in rows}) == len(rows), "an image has two rows"
    return {r.image_id: r.status for r in rows}


def test_what_can_be_read_moves_to_a_new_shard_and_its_neighbours_keep_their_rows() -> None:
    source = Source()
    manifest, _ = listed_run(source, {"b.jpg"})
    again = readable_again(manifest, source)
    assert again == {"b.jpg"}
    (new,) = refresh(manifest, source, again)
    assert [o.key for o in new.objects] == ["b.jpg"]
    label(manifest, new, set())
    assert statuses(manifest) == dict.fromkeys(NAMES, "ok")
    assert readable_again(manifest, source) == frozenset()
    assert refresh(manifest, source) == []
    assert run_status(manifest).images["ok"] == 4


def test_what_still_cannot_be_read_stays_as_it_is() -> None:
    source = Source()
    manifest, _ = listed_run(source, {"b.jpg", "c.jpg", "d.jpg"})
    source.denied = frozenset({"b.jpg", "c.jpg", "d.jpg"})
    before = manifest.committed()
    assert readable_again(manifest, source) == frozenset()
    assert manifest.committed() == before
    changed = Source()
    changed.put("b.jpg", b"another one")  # the listing's affair
    assert readable_again(manifest, changed) == frozenset()


def test_a_shard_without_any_label_is_labelled_as_it_is() -> None:
    source = Source()
    manifest, shards = listed_run(source, {"c.jpg", "d.jpg"})
    again = readable_again(manifest, source)
    assert again == frozenset()
    assert refresh(manifest, source, again) == [shards[1]]
    label(manifest, shards[1], set())
    assert statuses(manifest) == dict.fromkeys(NAMES, "ok")


def test_an_image_that_is_missing_again_in_its_new_shard_is_not_lost() -> None:
    source = Source()
    manifest, _ = listed_run(source, {"b.jpg"})
    (new,) = refresh(manifest, source, readable_again(manifest, source))
    label(manifest, new, {"b.jpg"})
    assert statuses(manifest)["b.jpg"] == "missing"
    assert refresh(manifest, source, readable_again(manifest, source)) == [new]
    label(manifest, new, set())
    assert statuses(manifest) == dict.fromkeys(NAMES, "ok")

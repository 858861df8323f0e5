"""A run with ``source.frames: all``: every page and animation frame is a row of its own, all the
way from the listing to the exports."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.exports.export import ExportRequest, export_version
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from pipelines.review.copies import copy_images
from pipelines.routing.route import route_run
from pipelines.runs.relocate import relocate_run
from pipelines.runs.verify import verify_run
from storage.objects.protocols import StorageOptions
from storage.records import AnnotationRow
from storage.review.queue import IMAGES, read_queue
from storage.runs.image_bytes import read_images
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.local import LocalStore
from tests.support.samples.labelled_run import CLASSES, label, png
from tests.support.samples.synthetic_run import record, with_inference
from tests.support.samples.tar_samples import tar_of
from workers.images.decode import decode

SHADES = (20, 90, 160, 230)


def pages(shades: tuple[int, ...] = SHADES) -> bytes:
    """A TIFF with a page of each shade, the second one broad."""
    first, *rest = (Image.new("RGB", (48 + 16 * n, 32), (s,) * 3) for n, s in enumerate(shades))
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


def animation() -> bytes:
    first, *rest = (Image.new("RGB", (40, 30), (s,) * 3) for s in SHADES[:3])
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest)
    return file.getvalue()


class World:
    """Loose files and a tar of each kind, with at most three frames a file."""

    def __init__(self, folder: Path) -> None:
        self.source = LocalStore(str(folder / "in"))
        self.output = LocalStore(str(folder / "out"))
        self.source.put("a.tif", pages())
        self.source.put("b.png", png(1))
        self.source.put("c.gif", animation())
        members = (("a.tif", pages(SHADES[:2])), ("a.tif", png(2)), ("z.gif", animation()))
        self.source.put("t.tar", tar_of(*members))
        self.record = with_inference(record(CLASSES, self.source.url), max_frames=3)

    def label(self, only: int | None = None) -> Manifest:
        return label(self.source, self.output, record_=self.record, only=only)


IDS = [
    "a.tif", "a.tif#2", "a.tif#3", "a.tif#4", "b.png", "c.gif", "c.gif#2", "c.gif#3",
    "t.tar/a.tif", "t.tar/a.tif#2", "t.tar/a.tif#3", "t.tar/z.gif", "t.tar/z.gif#2",
    "t.tar/z.gif#3",
]  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def by_id(manifest: Manifest) -> dict[str, AnnotationRow]:
    return {row.image_id: row for row in live_rows(manifest)}


def shade(pixels: NDArray[np.uint8]) -> int:
    return int(pixels.mean())


def test_every_frame_is_a_row_and_a_stopped_run_goes_on(world: World) -> None:
    world.label(only=1)
    manifest = world.label()
    rows = by_id(manifest)
    assert sorted(rows) == IDS
    assert len(list(live_rows(manifest))) == len(IDS)
    beyond = rows["a.tif#4"]
    assert (beyond.status, beyond.error) == (
        "too_large", "4 frames; this run takes up to 3 of a file",
    )  # fmt: skip
    labelled = [row for row in rows.values() if row is not beyond]
    assert {row.status for row in labelled} == {"ok"}
    assert len({row.sha256 for row in labelled}) == len(labelled) - 3  # the GIF is there twice
    assert rows["c.gif#2"].sha256 == rows["t.tar/z.gif#2"].sha256
    assert [rows[name].width for name in IDS[:3]] == [48, 64, 80]
    assert rows["a.tif"].frames == rows["a.tif#3"].frames == 4
    assert rows["a.tif#2"].nbytes == rows["a.tif"].nbytes == len(pages())


def test_the_images_of_rows_are_read_again_as_they_were_labelled(world: World) -> None:
    manifest = world.label()
    wanted = [row for row in live_rows(manifest) if row.status == "ok"]
    seen = {}
    for place, raw in read_images(manifest, world.source, wanted):
        assert isinstance(raw, bytes), raw
        seen[place.image_id] = decode(raw, max_pixels=1 << 20).pixels
    for name, expected in zip(IDS[:3], SHADES, strict=False):
        assert shade(seen[name]) == expected
    assert abs(shade(seen["t.tar/z.gif#2"]) - SHADES[1]) < 3
    assert shade(seen["t.tar/a.tif#2"]) == SHADES[1]
    assert np.array_equal(seen["t.tar/a.tif#3"], decode(png(2), max_pixels=1 << 20).pixels)


def test_verify_is_clean_and_notices_a_frame_too_many_or_too_few(world: World) -> None:
    manifest = world.label()
    found = verify_run(manifest, complete=True, source=world.source)
    assert found.differences == []
    assert found.images == len(IDS)
    key = next(
        o.key
        for o in world.output.list("annotations/")
        if "a.tif#2" in pq.read_table(io.BytesIO(world.output.get(o.key)))["image_id"].to_pylist()
    )
    raw = world.output.get(key)
    table = pq.read_table(io.BytesIO(raw))
    ids = table["image_id"].to_pylist()
    at = ids.index("a.tif#2")
    for edited in (table.slice(0, at), table.take([*range(at), *range(at + 1, len(ids))])):
        sink = io.BytesIO()
        pq.write_table(edited.replace_schema_metadata(table.schema.metadata), sink)
        world.output.put(key, sink.getvalue())
        said = [d.what for d in verify_run(manifest, source=world.source).differences]
        assert said
    world.output.put(key, raw)


def test_a_deleted_file_takes_all_of_its_frames_with_it(world: World) -> None:
    world.label()
    world.source.delete("a.tif")
    manifest = world.label()
    assert sorted(by_id(manifest)) == [i for i in IDS if not i.startswith("a.tif")]
    assert verify_run(manifest, source=world.source).differences == []


def test_copies_for_reviewers_show_the_frame(world: World) -> None:
    manifest = world.label()
    policy = Policy(accept=0.6, reject=0.1)
    route_run(manifest, budget="100 images", policy=policy, invocation="i", audit=1.0)
    items = list(read_queue(manifest.store))
    assert len(items) >= 10
    copies = copy_images(manifest, world.source, items)
    assert copies.problems == {}
    for item in items:
        shown = manifest.store.get(f"{IMAGES}{copies.names[item.sha256]}")
        image = Image.open(io.BytesIO(shown))
        assert getattr(image, "n_frames", 1) == 1
        if item.image_id in IDS[:3]:
            assert shade(np.asarray(image)) == SHADES[IDS.index(item.image_id)]


def test_an_export_holds_a_picture_for_each_frame(world: World, tmp_path: Path) -> None:
    manifest = world.label()
    decide_run(manifest, Policy(accept=0.6, reject=0.1))
    dest = tmp_path / "coco"
    export_version(manifest, str(dest), ExportRequest("coco", images="copy"))
    images = json.loads((dest / "annotations.json").read_text())["images"]
    assert len(images) == len(IDS) - 1
    for image in images:
        with Image.open(dest / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
    frame = next(i["file_name"] for i in images if i["file_name"].startswith("a") and "_2" in
                 i["file_name"])  # fmt: skip
    assert shade(np.asarray(Image.open(dest / "images" / frame))) == SHADES[1]


def test_a_moved_source_is_compared_frame_by_frame(world: World, tmp_path: Path) -> None:
    manifest = world.label()
    moved = LocalStore(str(tmp_path / "moved"))
    for listed in world.source.list():
        moved.put(listed.key, world.source.get(listed.key))
    done = relocate_run(manifest, moved.url, StorageOptions(), sample=50)
    assert done.compared >= 10
    assert Listing(manifest.store).place() == moved.url

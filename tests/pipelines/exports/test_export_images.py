"""Images of an export: copied, linked or left out, upright, inside its folder."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.exports.export import ExportFormat
from pipelines.exports.file_names import FileNames
from pipelines.exports.place import ExportPlace
from pipelines.labels.decide import decide_run
from pipelines.policy.policy import Policy
from storage.errors import ConfigError, StorageError
from storage.records import Shard, shard_id_of
from storage.runs.image_bytes import fetch_images
from storage.runs.listing import Listing
from storage.shards.selecting import IMAGE_SUFFIXES, group_images
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.pipelines.exports.labelled import (
    FORMATS,
    POLICY,
    Labelled,
    export_to,
    jpeg,
    labelled_run,
)
from tests.pipelines.exports.reading import READERS
from tests.support.faulty import FaultyStore
from tests.support.samples.image_samples import picture
from tests.support.samples.labelled_run import label, png
from tests.support.samples.synthetic_run import commit_rows, make_run, row
from workers.images.decode import decode


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_copied_images_are_the_same_bytes_and_nothing_leaves_the_folder(
    hostile: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    dest = tmp_path / "place" / "out"
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    summary = export_to(hostile, dest, format, "copy")
    assert (summary.images, summary.left_out) == (7, 0)
    made = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert all(p.is_relative_to(dest) for p in made)
    assert READERS[format](dest).keys() == hostile.raw.keys()
    if format == "hf":
        table = pq.read_table(dest / "data").to_pylist()
        copied = {row["image_id"]: row["image"]["bytes"] for row in table}
        assert copied == hostile.raw
    else:
        copied_bytes = sorted(p.read_bytes() for p in (dest / "images").rglob("*") if p.is_file())
        assert copied_bytes == sorted(hostile.raw.values())


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_links_lead_to_the_source(loose: Labelled, tmp_path: Path, format: ExportFormat) -> None:
    dest = tmp_path / "out"
    export_to(loose, dest, format, "link")
    links = [p for p in (dest / "images").rglob("*") if p.is_symlink()]
    assert sorted(p.read_bytes() for p in links) == sorted(loose.raw.values())


def test_links_stay_in_a_folder_with_an_odd_name(loose: Labelled, tmp_path: Path) -> None:
    dest = tmp_path / "a b" / "50% ü"
    export_to(loose, dest, "coco", "link")
    links = [p for p in tmp_path.rglob("*") if p.is_symlink()]
    assert len(links) == 4
    assert all(p.is_relative_to(dest / "images") for p in links)
    assert sorted(p.read_bytes() for p in links) == sorted(loose.raw.values())


@pytest.mark.parametrize("replaced", ["a.jpg", "sub"])
def test_what_has_become_a_link_since_is_not_linked_to(
    loose: Labelled, tmp_path: Path, replaced: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.jpg").write_bytes(b"secret")
    there = tmp_path / "source" / replaced
    there.rename(tmp_path / "moved")
    there.symlink_to(elsewhere / "a.jpg" if replaced == "a.jpg" else elsewhere)
    summary = export_to(loose, tmp_path / "out", "coco", "link")
    assert (summary.images, summary.left_out) == (3, 1)
    links = [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]
    assert all(p.read_bytes() != b"secret" for p in links)


def test_links_into_a_tar_are_refused(hostile: Labelled, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inside tar shards") as caught:
        export_to(hostile, tmp_path / "out", "coco", "link")
    assert "--images copy" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_is_gone_is_left_out_and_said(
    loose: Labelled, tmp_path: Path, format: ExportFormat
) -> None:
    (tmp_path / "source" / "b.jpg").unlink()
    summary = export_to(loose, tmp_path / "out", format, "copy")
    assert (summary.images, summary.left_out) == (3, 1)
    assert "b.jpg" in str(summary.first_problem)
    assert READERS[format](tmp_path / "out").keys() == {"a.jpg", "sub/a.jpg", "z.png"}


def test_a_picture_that_replaced_the_labelled_one_is_not_linked(
    loose: Labelled, tmp_path: Path
) -> None:
    (tmp_path / "source" / "a.jpg").write_bytes(jpeg(200) + b" ")
    for mode in ("copy", "link"):
        summary = export_to(loose, tmp_path / mode, "coco", mode)
        assert (summary.images, summary.left_out) == (3, 1)
        assert "'a.jpg'" in str(summary.first_problem)


def test_a_rewrite_of_the_same_size_is_not_linked_either(loose: Labelled, tmp_path: Path) -> None:
    path = tmp_path / "source" / "a.jpg"
    path.write_bytes(b"x" * path.stat().st_size)
    assert export_to(loose, tmp_path / "out", "yolo", "link").left_out == 1


def test_what_was_copied_back_with_the_same_bytes_is_taken(loose: Labelled, tmp_path: Path) -> None:
    for path in (tmp_path / "source").rglob("*.*"):
        os.utime(path, ns=(1, 1))  # another etag
    (tmp_path / "source" / "b.jpg").write_bytes(b"x" * len(loose.raw["b.jpg"]))
    for mode in ("copy", "link"):
        summary = export_to(loose, tmp_path / mode, "coco", mode)
        assert (summary.images, summary.left_out) == (3, 1)
        assert "b.jpg" in str(summary.first_problem)


def test_a_tar_that_was_copied_back_gives_its_images(hostile: Labelled, tmp_path: Path) -> None:
    (path,) = (tmp_path / "source").iterdir()
    os.utime(path, ns=(1, 1))
    summary = export_to(hostile, tmp_path / "out", "coco", "copy")
    assert (summary.images, summary.left_out) == (7, 0)
    raw = tmp_path / "raw"
    raw.mkdir()
    kind = "gz" if path.suffix == ".gz" else ""
    with tarfile.open(path, "w:" + kind) as tar:  # every member but one is another one now
        for n, name in enumerate(("a.jpg", "A.JPG", "../../escape.jpg")):
            (raw / "x.jpg").write_bytes(jpeg(60) if n == 0 else jpeg(7))
            tar.add(raw / "x.jpg", arcname=name)
    rows = hostile.rows()
    source = open_store(str(tmp_path / "source"))
    found = fetch_images(hostile.manifest, source, rows)
    assert len(found) == 7
    same = {name for name, raw in found.items() if isinstance(raw, bytes)}
    assert same <= {row.image_id for row in rows if row.image_id.endswith("/a.jpg")}
    assert all(found[name] == hostile.raw[name] for name in same)
    assert bool(same) is bool(kind)  # in a plain tar it lies at another place


@pytest.mark.parametrize("stopped", [False, True], ids=["in one go", "continued"])
def test_an_image_that_two_shards_list_is_copied_for_both(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_store(str(tmp_path / "source"))
    for shade, name in enumerate("abc"):
        source.put(f"{name}.jpg", jpeg(60 * shade))
    a, b, c = listed = list(source.list())
    shards = [Shard(shard_id_of(some), "images", some) for some in ((a, b), (b, c))]
    run = make_run(MemoryStore(), {}, source=source.url)
    Listing(run.store).refresh(listed, lambda objects: iter(shards if list(objects) else ()))
    for shard in shards:
        digests = [hashlib.sha256(source.get(one.key)).hexdigest() for one in shard.objects]
        commit_rows(run, shard, [
            replace(row(one.key, shard.shard_id, nbytes=one.nbytes), sha256=digest)
            for one, digest in zip(shard.objects, digests, strict=True)
        ])  # fmt: skip
    decide_run(run, POLICY)
    labelled = Labelled(run, {})
    if stopped:
        with monkeypatch.context() as patch:
            patch.setattr(ExportPlace, "finish", stop)
            with pytest.raises(StorageError, match="stopped"):
                export_to(labelled, tmp_path / "out", "coco", "copy")
    summary = export_to(labelled, tmp_path / "out", "coco", "copy")
    assert (summary.images, summary.left_out) == (4, 0)
    written = json.loads((tmp_path / "out" / "annotations.json").read_bytes())["images"]
    copies = {one["file_name"]: one["labelfleet"]["image_id"] for one in written}
    assert sorted(copies.values()) == ["a.jpg", "b.jpg", "b.jpg", "c.jpg"]
    for name, image_id in copies.items():
        assert (tmp_path / "out" / "images" / name).read_bytes() == source.get(image_id)


def test_many_small_shards_cost_one_look_at_the_listing(tmp_path: Path) -> None:
    source = MemoryStore()
    for number in range(40):
        source.put(f"{number:02}.png", png(number))
    output = FaultyStore(MemoryStore())
    run = label(source, output, shard_size=1)
    decide_run(run, Policy(accept=0.1, reject=0.05))
    output.calls.clear()
    summary = export_to(Labelled(run, {}), tmp_path / "out", "coco", "copy")
    assert (summary.images, summary.left_out) == (40, 0)
    assert sum(output.calls.values()) < 20, "the listing is read again for each shard"


def stop(*what: object) -> None:
    raise StorageError("stopped")


def test_gifs_and_every_other_suffix_of_a_source_are_kept() -> None:
    for suffix in IMAGE_SUFFIXES:
        assert FileNames(flat=True).name(f"sub/a.b{suffix}") == f"sub_a.b{suffix}"
        assert FileNames(flat=True).name(f"a{suffix}#2").endswith(suffix)


def test_formats_that_few_readers_know_are_copied_as_png(tmp_path: Path) -> None:
    import pillow_heif

    (tmp_path / "run").mkdir()
    folder = tmp_path / "source"
    folder.mkdir()
    image = Image.fromarray(picture(48, 64))
    pillow_heif.from_pillow(image).save(folder / "a.heic", quality=-1)
    image.save(folder / "b.jp2")
    image.save(folder / "c.avif", quality=100)
    image.save(folder / "d.jpg")
    (shard,) = group_images(list(open_store(str(folder)).list()), 100)
    labelled = labelled_run(tmp_path, shard)
    formats: tuple[ExportFormat, ...] = ("coco", "yolo")
    for written in formats:
        dest = tmp_path / written
        summary = export_to(labelled, dest, written, "copy")
        assert (summary.left_out, summary.turned_upright) == (0, 3)
        for name in ("a.heic", "b.jp2", "c.avif"):
            (copy,) = dest.rglob(f"{name}.png")
            seen = cv2.imread(str(copy))
            assert seen is not None
            pixels = decode((folder / name).read_bytes(), max_pixels=10**6).pixels
            np.testing.assert_array_equal(seen[..., ::-1], pixels)
        (kept,) = dest.rglob("d.jpg")
        assert kept.read_bytes() == (folder / "d.jpg").read_bytes()
    assert (tmp_path / "yolo" / "labels" / "a.heic.txt").is_file()


def test_a_turned_image_is_copied_upright(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = tmp_path / "source"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored = np.zeros((64, 48, 3), np.uint8)
    stored[:20] = (250, 0, 0)  # the top as stored is the right side upright
    for name in ("a.jpg", "b.png", "c.webp"):
        quality = {"lossless": True} if name == "c.webp" else {"quality": 95}
        Image.fromarray(stored).save(folder / name, exif=exif, **quality)
    (folder / "d.jpg").write_bytes(jpeg(9))
    (shard,) = group_images(list(open_store(str(folder)).list()), 100)
    labelled = labelled_run(tmp_path, shard)
    dest = tmp_path / "out"
    summary = export_to(labelled, dest, "coco", "copy")
    assert (summary.turned_upright, summary.left_out) == (3, 0)
    for name in ("a.jpg", "b.png", "c.webp"):
        with Image.open(dest / "images" / name) as opened:
            assert opened.format == {"j": "JPEG", "p": "PNG", "w": "WEBP"}[name[2]]
            assert 0x0112 not in opened.getexif()
            pixels = np.asarray(opened.convert("RGB"), np.int64)
        assert pixels.shape == (48, 64, 3)
        assert pixels[24, 55, 0] > 240
        assert pixels[24, 20, 0] < 10
    assert (dest / "images" / "d.jpg").read_bytes() == jpeg(9)
